{{/* Where the checkpoint comes from, and its manifest. */}}

{{- define "collegium.modelPath" -}}
{{- if eq .Values.model.source "image" }}{{ .Values.model.image.path }}{{ else }}/models/checkpoint{{ end }}
{{- end }}

{{- define "collegium.manifestPath" -}}
{{- with .Values.model.manifest }}{{ include "collegium.modelPath" $ }}/{{ . }}{{ else }}/cache/manifest.json{{ end }}
{{- end }}

{{- define "collegium.modelVolumes" -}}
{{- if eq .Values.model.source "pvc" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ .Values.model.pvc.claimName }}
    readOnly: true
{{- else if eq .Values.model.source "objectStore" }}
- name: model
  {{- toYaml (.Values.model.objectStore.volume | default (dict "emptyDir" dict)) | nindent 2 }}
{{- end }}
{{- end }}

{{- define "collegium.modelMounts" -}}
{{- if ne .Values.model.source "image" }}
- name: model
  mountPath: /models/checkpoint
  {{- if eq .Values.model.source "pvc" }}
  {{- with .Values.model.pvc.subPath }}
  subPath: {{ . }}
  {{- end }}
  {{- end }}
  readOnly: true
{{- end }}
{{- end }}

{{/* Fetch the checkpoint where it comes from an object store; a gateway needs no weights. */}}
{{- define "collegium.fetchContainer" -}}
{{- $store := .root.Values.model.objectStore }}
{{- if eq .root.Values.model.source "objectStore" }}
- name: fetch-model
  image: {{ include "collegium.imageRef" (dict "image" $store.image "tag" "") }}
  imagePullPolicy: {{ $store.image.pullPolicy }}
  securityContext:
    {{- toYaml .root.Values.securityContext | nindent 4 }}
  args:
    - copy
    - {{ $store.remote | quote }}
    - /models/checkpoint
    - --config=
    - --stats=30s
    - --stats-one-line
    {{- if eq .role "gateway" }}
    - --exclude=*.safetensors
    {{- end }}
    {{- range $store.extraArgs }}
    - {{ . | quote }}
    {{- end }}
  {{- with $store.existingSecret }}
  envFrom:
    - secretRef:
        name: {{ . }}
  {{- end }}
  env:
    - name: HOME
      value: /tmp
  resources:
    {{- toYaml $store.resources | nindent 4 }}
  volumeMounts:
    - name: tmp
      mountPath: /tmp
    - name: model
      mountPath: /models/checkpoint
{{- end }}
{{- end }}

{{/* Make the manifest where none was made before: it reads every expert once, and warms the node's page cache by that. */}}
{{- define "collegium.manifestContainer" -}}
{{- if not .root.Values.model.manifest }}
- name: make-manifest
  {{- include "collegium.image" .root | nindent 2 }}
  securityContext:
    {{- toYaml .root.Values.securityContext | nindent 4 }}
  args: [collegium, manifest, {{ include "collegium.modelPath" .root | quote }}, --out, {{ include "collegium.manifestPath" .root | quote }}]
  env:
    - name: HOME
      value: /cache
  resources:
    {{- toYaml (index .root.Values .role).resources | nindent 4 }}
  volumeMounts:
    {{- include "collegium.volumeMounts" . | nindent 4 }}
    {{- include "collegium.modelMounts" .root | nindent 4 }}
{{- end }}
{{- end }}
