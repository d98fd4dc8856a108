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
