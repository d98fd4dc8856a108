{{/*
Names, labels and what several templates share. A role is gateway, router, worker or balancer; helpers that need one take
(dict "root" $ "role" "router").
*/}}

{{- define "collegium.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* 40 characters: a StatefulSet's name and a hash of eleven more must fit into a label of 63. */}}
{{- define "collegium.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "collegium.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "collegium.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "collegium.roleName" -}}
{{- printf "%s-%s" (include "collegium.fullname" .root) .role }}
{{- end }}

{{/* Labels of an object that belongs to no role. */}}
{{- define "collegium.baseLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "collegium.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: collegium
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "collegium.labels" -}}
{{ include "collegium.baseLabels" .root }}
app.kubernetes.io/component: {{ .role }}
{{- end }}

{{- define "collegium.selectorLabels" -}}
app.kubernetes.io/name: {{ include "collegium.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end }}

{{/* A pod's labels: no chart version among them, or every release of the chart would restart every pod. */}}
{{- define "collegium.podLabels" -}}
{{ include "collegium.selectorLabels" . }}
app.kubernetes.io/part-of: collegium
{{- with (index .root.Values .role).podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "collegium.serviceAccountName" -}}
{{- $account := (index .root.Values .role).serviceAccount }}
{{- if $account.create }}{{ $account.name | default (include "collegium.roleName" .) }}{{ else }}{{ $account.name | default "default" }}{{ end }}
{{- end }}

{{/* An image from (dict "image" ... "tag" default tag). */}}
{{- define "collegium.imageRef" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .tag }}
{{- end }}
{{- end }}

{{- define "collegium.image" -}}
image: {{ include "collegium.imageRef" (dict "image" .Values.image "tag" .Chart.AppVersion) }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* Ports are fixed: each pod has an address of its own, so there is nothing to avoid. */}}
{{- define "collegium.port" -}}
{{- get (dict "gateway" "50051" "router" "7001" "worker" "7002" "balancer" "7000" "data" "7003" "health" "8081" "metrics" "9090" "valkey" "6379") . }}
{{- end }}

{{/* HOST:PORT to listen on. All addresses, not the pod's alone: `kubectl port-forward` comes by loopback. */}}
{{- define "collegium.bind" -}}
{{ ternary "[::]" "0.0.0.0" (eq .root.Values.ipFamily "IPv6") }}:{{ include "collegium.port" .port }}
{{- end }}

{{/* HOST:PORT that other pods are told. */}}
{{- define "collegium.advertise" -}}
{{ ternary "[$(POD_IP)]" "$(POD_IP)" (eq .root.Values.ipFamily "IPv6") }}:{{ include "collegium.port" .port }}
{{- end }}

{{/* A setting as text. Numbers of a values file arrive as floats, and 1.6e+07 is no whole number. */}}
{{- define "collegium.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ printf "%.0f" . }}{{ else }}{{ toString . }}{{ end }}
{{- end }}

{{/* Environment of every role: what all services take, then the role's own `settings`. */}}
{{- define "collegium.env" -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: COLLEGIUM_BIND
  value: {{ include "collegium.bind" (dict "root" .root "port" .role) | quote }}
- name: COLLEGIUM_HEALTH_BIND
  value: {{ include "collegium.bind" (dict "root" .root "port" "health") | quote }}
- name: COLLEGIUM_METRICS_BIND
  value: {{ include "collegium.bind" (dict "root" .root "port" "metrics") | quote }}
{{- if ne .role "balancer" }}
- name: COLLEGIUM_ADVERTISE
  value: {{ include "collegium.advertise" (dict "root" .root "port" .role) | quote }}
- name: COLLEGIUM_BALANCER
  value: {{ printf "%s:%s" (include "collegium.roleName" (dict "root" .root "role" "balancer")) (include "collegium.port" "balancer") | quote }}
{{- end }}
- name: COLLEGIUM_LOG_LEVEL
  value: {{ .root.Values.log.level | quote }}
- name: COLLEGIUM_LOG_FORMAT
  value: {{ .root.Values.log.format | quote }}
{{- with .root.Values.tracing.endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
- name: COLLEGIUM_TRACE_RATIO
  value: {{ $.root.Values.tracing.ratio | quote }}
{{- end }}
# The root file system is read-only. Triton keeps what it compiled below HOME.
- name: HOME
  value: {{ ternary "/cache" "/tmp" (has .role (list "router" "worker")) }}
{{- range $name, $value := (index .root.Values .role).settings }}
- name: COLLEGIUM_{{ upper $name }}
  value: {{ include "collegium.text" $value | quote }}
{{- end }}
{{- end }}

{{/*
Environment of what computes, in a container that is named after its role. Threads come from the CPU request, so that the
two cannot drift apart; without a request the field reads 0, which services take as "as many as there are cores".
*/}}
{{- define "collegium.computeEnv" -}}
{{- $values := index .root.Values .role }}
- name: COLLEGIUM_THREADS
  {{- if kindIs "invalid" $values.threads }}
  valueFrom:
    resourceFieldRef:
      containerName: {{ .role }}
      resource: requests.cpu
  {{- else }}
  value: {{ include "collegium.text" $values.threads | quote }}
  {{- end }}
# For the threads that services start beside those that compute.
- name: OMP_NUM_THREADS
  value: $(COLLEGIUM_THREADS)
- name: XDG_CACHE_HOME
  value: /cache
- name: COLLEGIUM_DTYPE
  value: {{ .root.Values.model.dtype | quote }}
- name: COLLEGIUM_DEVICE
  value: {{ ternary "cuda:0" "cpu" (eq $values.device "cuda") | quote }}
- name: COLLEGIUM_MANIFEST
  value: {{ include "collegium.manifestPath" .root | quote }}
{{- end }}

{{- define "collegium.resources" -}}
{{- $values := index .root.Values .role }}
{{- $resources := deepCopy $values.resources }}
{{- if eq ($values.device | default "cpu") "cuda" }}
{{- $gpu := dict "limits" (dict $values.gpuResource 1) }}
{{- $resources = merge $gpu $resources }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/*
Probes, all gRPC, all at the plaintext health port (a pod's own port may ask for TLS).
Readiness is the service's own word: it can do its work now. Liveness asks for "live" alone, which is true as long as the
event loop turns: no peer, no Redis and no load decides it, for a restart would mend none of them.

Startup holds liveness back until it has succeeded once. For routers and workers it asks for readiness: importing torch and
loading a model stop the event loop for longer than liveness may tolerate, so liveness must not begin before that is over.
The price: a pod whose peers are missing for startup.minutes is restarted though nothing is wrong with it; it had nothing to
do. Gateways and balancers load nothing and only wait for others, so there startup asks for "live".
*/}}
{{- define "collegium.probes" -}}
{{- $health := include "collegium.port" "health" }}
{{- if has .role (list "router" "worker") }}
startupProbe:
  grpc:
    port: {{ $health }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ mul .root.Values.startup.minutes 6 }}
{{- else }}
startupProbe:
  grpc:
    port: {{ $health }}
    service: live
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 60
{{- end }}
livenessProbe:
  grpc:
    port: {{ $health }}
    service: live
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc:
    port: {{ $health }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
{{- end }}

{{/* Ports of a container: the role's own, the health port, metrics. */}}
{{- define "collegium.commonPorts" -}}
- name: health
  containerPort: {{ include "collegium.port" "health" }}
  protocol: TCP
- name: metrics
  containerPort: {{ include "collegium.port" "metrics" }}
  protocol: TCP
{{- end }}

{{/* Fields of a pod's spec that do not depend on what it runs. */}}
{{- define "collegium.podSpec" -}}
{{- $values := index .root.Values .role }}
serviceAccountName: {{ include "collegium.serviceAccountName" . }}
automountServiceAccountToken: false
# Else every Service of the namespace becomes variables such as COLLEGIUM_BALANCER_PORT, beside those that are settings.
enableServiceLinks: false
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: {{ $values.spread.whenUnsatisfiable }}
    # Nodes that these pods may not use do not count.
    nodeAffinityPolicy: Honor
    nodeTaintsPolicy: Honor
    labelSelector:
      matchLabels:
        {{- include "collegium.selectorLabels" . | nindent 8 }}
    {{- if eq .role "gateway" "balancer" }}
    # A rollout's new pods are spread among themselves, not beside the old ones that are about to go.
    matchLabelKeys: [pod-template-hash]
    {{- end }}
{{- end }}

{{- define "collegium.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: 256Mi
{{- if has .role (list "router" "worker") }}
- name: cache
  emptyDir:
    sizeLimit: {{ .root.Values.cache.sizeLimit }}
{{- end }}
{{- end }}

{{- define "collegium.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
{{- if has .role (list "router" "worker") }}
- name: cache
  mountPath: /cache
{{- end }}
{{- end }}

{{/*
How many pods of a role there are at least, whatever scales them.
*/}}
{{- define "collegium.fewestPods" -}}
{{- $values := index .root.Values .role }}
{{- $scaler := ternary ($values.autoscaling | default dict) ($values.keda | default dict) (eq .role "gateway") }}
{{- ternary $scaler.minReplicas $values.replicas ($scaler.enabled | default false) | int }}
{{- end }}

{{/*
Budget of one role. Where a budget of maxUnavailable would let the last pod go, it says minAvailable: 1 instead, which an
eviction waits for; podDisruptionBudget.protectLast=false takes that back. An unready pod may always be evicted: it serves
nobody, and would block a node's drain for ever.
*/}}
{{- define "collegium.podDisruptionBudget" -}}
{{- $budget := (index .root.Values .role).podDisruptionBudget }}
{{- if $budget.enabled }}
{{- $fewest := include "collegium.fewestPods" . | int }}
{{- $may_go := $budget.maxUnavailable | toString }}
{{- if hasSuffix "%" $may_go }}
{{- $may_go = divf (mulf (trimSuffix "%" $may_go) $fewest) 100 | ceil }}
{{- end }}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "collegium.roleName" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "collegium.labels" . | nindent 4 }}
spec:
  {{- if and $budget.protectLast (le $fewest (int $may_go)) }}
  minAvailable: 1
  {{- else }}
  maxUnavailable: {{ $budget.maxUnavailable }}
  {{- end }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "collegium.selectorLabels" . | nindent 6 }}
{{- end }}
{{- end }}

{{- define "collegium.serviceAccount" -}}
{{- $account := (index .root.Values .role).serviceAccount }}
{{- if $account.create }}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "collegium.serviceAccountName" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "collegium.labels" . | nindent 4 }}
  {{- with $account.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
# No service talks to the API server.
automountServiceAccountToken: false
{{- end }}
{{- end }}

{{/* A service of a StatefulSet: names for its pods. Nothing is balanced by it; members find each other by the balancer. */}}
{{- define "collegium.headlessService" -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "collegium.roleName" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "collegium.labels" . | nindent 4 }}
spec:
  type: ClusterIP
  clusterIP: None
  selector:
    {{- include "collegium.selectorLabels" . | nindent 4 }}
  ports:
    - name: grpc
      port: {{ include "collegium.port" .role }}
      targetPort: grpc
      protocol: TCP
      appProtocol: kubernetes.io/h2c
{{- end }}
