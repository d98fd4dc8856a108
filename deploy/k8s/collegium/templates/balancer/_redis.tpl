{{/* REDIS_URL of the balancer: never a flag and never a plain value where it holds a password. */}}
{{- define "collegium.redisEnv" -}}
{{- if .Values.valkey.enabled }}
{{- $valkey := .Subcharts.valkey }}
{{- $address := printf "%s:%s/0" (include "valkey.fullname" $valkey) (include "collegium.port" "valkey") }}
{{- with $valkey.Values.auth.existingSecret }}
- name: VALKEY_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $valkey.Values.auth.key }}
- name: REDIS_URL
  value: {{ printf "redis://:$(VALKEY_PASSWORD)@%s" $address | quote }}
{{- else }}
- name: REDIS_URL
  value: {{ printf "redis://%s" $address | quote }}
{{- end }}
{{- else }}
- name: REDIS_URL
  {{- with .Values.externalRedis.existingSecret }}
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.externalRedis.key }}
  {{- else }}
  value: {{ .Values.externalRedis.url | quote }}
  {{- end }}
{{- end }}
{{- end }}
