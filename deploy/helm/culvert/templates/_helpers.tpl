{{- define "culvert.labels" -}}
app.kubernetes.io/name: culvert
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "culvert.image" -}}
{{- $tag := .image.tag | default .chart.AppVersion -}}
{{ .image.repository }}{{ ternary "@" ":" (hasPrefix "sha256:" $tag) }}{{ $tag }}
{{- end }}

{{- define "culvert.serverNamespace" -}}
{{ .Values.server.namespace | default .Release.Namespace }}
{{- end }}

{{- define "culvert.podSecurity" -}}
runAsNonRoot: {{ ne (int .) 0 }}
runAsUser: {{ . }}
runAsGroup: {{ . }}
{{- if ne (int .) 0 }}
fsGroup: {{ . }}
{{- end }}
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "culvert.containerSecurity" -}}
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: { drop: [ALL] }
{{- end }}

{{- define "culvert.placement" -}}
{{- $of := . }}
{{- range $field := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $of $field }}
{{ $field }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Volume with a certificate and its key, under cert-manager's names, and with nothing else of the Secret. */}}
{{- define "culvert.pair" -}}
secret: { secretName: {{ . }}, items: [{ key: tls.crt, path: tls.crt }, { key: tls.key, path: tls.key }] }
{{- end }}

{{/* Volume with ca.crt of a Secret or of a ConfigMap; a CA's own key, if the Secret has it, stays out. */}}
{{- define "culvert.ca" -}}
{{- if .secret -}}
secret: { secretName: {{ .secret }}, items: [{ key: {{ .key }}, path: ca.crt }] }
{{- else -}}
configMap: { name: {{ .configMap }}, items: [{ key: {{ .key }}, path: ca.crt }] }
{{- end }}
{{- end }}

{{/* Peers of a NetworkPolicy for a list of networks. */}}
{{- define "culvert.networks" -}}
{{- range . }}
- ipBlock: { cidr: {{ . | quote }} }
{{- end }}
{{- end }}
