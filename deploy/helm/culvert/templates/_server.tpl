{{- define "culvert.isStatic" -}}
{{- if eq .Values.server.kind "StaticPod" }}true{{ end }}
{{- end }}

{{- define "culvert.mode" -}}
{{- $static := include "culvert.isStatic" . }}
{{- if and (not $static) (eq .Values.server.mode "grpc") }}
{{- fail "server.mode: kube-apiserver speaks gRPC over a Unix socket only: use http-connect, or server.kind StaticPod" }}
{{- end }}
{{- .Values.server.mode | default (ternary "grpc" "http-connect" (not (not $static))) }}
{{- end }}

{{- define "culvert.asksKubeApiserver" -}}
{{- with .Values.server }}
{{- if or (ne .authentication "certificate") .leases (eq .agentIdentity "node") }}true{{ end }}
{{- end }}
{{- end }}

{{/* Path of the CA of agents' certificates, of a static Pod. */}}
{{- define "culvert.agentCaPath" -}}
{{- with .Values.server }}
{{- $path := required "server.agentCa.path: set the path of the CA of the agents' certificates" .agentCa.path }}
{{- if and (eq $path "/etc/kubernetes/pki/ca.crt") (eq .agentIdentity "any") }}
{{- fail "server.agentCa.path: the cluster's CA signs the certificates of kubelets and users too, and each of them would be an agent's: use a CA of its own, tokens, or server.agentIdentity node" }}
{{- end }}
{{- $path }}
{{- end }}
{{- end }}

{{/* Flags of both kinds of server. */}}
{{- define "culvert.serverFlags" -}}
{{- with .Values.server -}}
{{- if ne .authentication "certificate" -}}
- --agent-namespace={{ .agentNamespace }}
- --agent-service-account=culvert-agent
- --authentication-audience={{ $.Values.agent.token.audience }}
{{ end -}}
- --agent-identity={{ .agentIdentity }}
- --server-count={{ .replicas }}
{{- if .leases }}
- --enable-lease-controller=true
- --lease-namespace=kube-system
{{- end }}
{{- if .advertiseAddress }}
- --advertise-address=$(POD_IP)
{{- end }}
- --agent-port={{ .ports.agent }}
- --admin-port={{ .ports.admin }}
- --health-port={{ .ports.health }}
{{- if .operatorSocket }}
- --operator-socket=/run/culvert-server/operator.sock
{{- end }}
- --graceful-shutdown-timeout={{ .gracefulShutdownTimeout }}
- --log-format=json
{{- range .extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Fields of both kinds of container, below its arguments. */}}
{{- define "culvert.serverContainer" -}}
{{- with .Values.server -}}
env:
- name: POD_IP
  valueFrom: { fieldRef: { fieldPath: status.podIP } }
# No readiness probe: a control plane starts before its nodes.
livenessProbe:
  httpGet: { path: /healthz, port: {{ .ports.health }}{{ if include "culvert.isStatic" $ }}, host: 127.0.0.1{{ end }} }
  timeoutSeconds: 5
resources: {{ toJson .resources }}
securityContext:
  {{- include "culvert.containerSecurity" . | nindent 2 }}
ports:
- { name: agent-udp, containerPort: {{ .ports.agent }}, protocol: UDP }
- { name: agent-tcp, containerPort: {{ .ports.agent }}, protocol: TCP }
- { name: health, containerPort: {{ .ports.health }} }
{{- if not (include "culvert.isStatic" $) }}
- { name: frontend, containerPort: {{ .frontend.port }} }
{{- end }}
{{- end }}
{{- end }}

{{- define "culvert.service" }}
{{- $server := .root.Values.server }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ .name }}
  namespace: {{ include "culvert.serverNamespace" .root }}
  {{- with .annotations }}
  annotations: {{ toJson . }}
  {{- end }}
spec:
  type: {{ $server.service.type }}
  {{- if ne $server.service.type "ClusterIP" }}
  externalTrafficPolicy: {{ $server.service.externalTrafficPolicy }}
  {{- end }}
  {{- with $server.service.ipFamilyPolicy }}
  ipFamilyPolicy: {{ . }}
  {{- end }}
  {{- with $server.service.loadBalancerClass }}
  loadBalancerClass: {{ . }}
  {{- end }}
  {{- with $server.service.loadBalancerSourceRanges }}
  loadBalancerSourceRanges: {{ toJson . }}
  {{- end }}
  # No session affinity: an agent needs a tunnel to every server.
  selector: { k8s-app: culvert-server }
  ports:
  {{- range .protocols }}
  - { name: agent-{{ lower . }}, protocol: {{ . }}, port: {{ $server.ports.agent }}, targetPort: {{ $server.ports.agent }} }
  {{- end }}
{{- end }}
