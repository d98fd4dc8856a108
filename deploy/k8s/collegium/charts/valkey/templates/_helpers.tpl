{{- define "valkey.fullname" -}}
{{- .Values.fullnameOverride | default (printf "%s-valkey" .Release.Name) | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "valkey.selectorLabels" -}}
app.kubernetes.io/name: valkey
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: memory
{{- end }}

{{- define "valkey.labels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{ include "valkey.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: collegium
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "valkey.config" -}}
port 6379
dir /data
maxmemory {{ .Values.maxMemory }}
# Leases expire by themselves; nothing else may be dropped in silence.
maxmemory-policy noeviction
{{- if .Values.persistence.enabled }}
appendonly yes
appendfsync everysec
{{- else }}
appendonly no
{{- end }}
save ""
# Off, or a server without a password answers its own pod alone. The NetworkPolicy stands in its place.
protected-mode {{ ternary "yes" "no" (not (empty .Values.auth.existingSecret)) }}
{{- end }}
