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

{{- define "culvert.serverPod" -}}
{{- $static := eq .Values.server.kind "StaticPod" }}
{{- $needsKubeconfig := or (ne .Values.server.authentication "certificate") .Values.server.leases (eq .Values.server.agentIdentity "node") }}
{{- with .Values.server -}}
{{- if $static }}
hostNetwork: true
{{- else }}
automountServiceAccountToken: false
{{- with $.Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- end }}
priorityClassName: {{ .priorityClassName | default (ternary "system-node-critical" "" $static) | quote }}
terminationGracePeriodSeconds: {{ .terminationGracePeriodSeconds }} # above --graceful-shutdown-timeout
{{- if not $static }}
{{- include "culvert.placement" . | nindent 0 }}
{{- end }}
securityContext:
  {{- include "culvert.podSecurity" .runAsUser | nindent 2 }}
containers:
- name: culvert-server
  image: {{ include "culvert.image" (dict "image" .image "chart" $.Chart) }}
  imagePullPolicy: {{ .image.pullPolicy }}
  command: ["/culvert-server"]
  args:
  - --mode={{ .mode }}
  {{- if $static }}
  - --uds-name={{ .socket }}
  - --server-port=0
  - --cluster-cert={{ .agentCertificate.certificate }}
  - --cluster-key={{ .agentCertificate.key }}
  {{- else }}
  - --server-port={{ .frontend.port }}
  - --server-cert=/etc/culvert/frontend/tls.crt
  - --server-key=/etc/culvert/frontend/tls.key
  - --server-ca-cert=/etc/culvert/frontend/ca.crt
  {{- with .frontend.clientNames }}
  - --server-client-names={{ . }}
  {{- end }}
  - --cluster-cert=/etc/culvert/server/tls.crt
  - --cluster-key=/etc/culvert/server/tls.key
  {{- end }}
  {{- if ne .authentication "token" }}
  - --cluster-ca-cert={{ ternary "/etc/kubernetes/pki/ca.crt" "/etc/culvert/agent-ca/ca.crt" $static }}
  {{- end }}
  {{- if ne .authentication "certificate" }}
  - --agent-namespace={{ .agentNamespace }}
  - --agent-service-account=culvert-agent
  - --authentication-audience={{ $.Values.agent.token.audience }}
  {{- end }}
  {{- if $needsKubeconfig }}
  - --kubeconfig={{ ternary .kubeconfig "/etc/culvert/kubeconfig/kubeconfig" $static }}
  {{- end }}
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
  - --graceful-shutdown-timeout={{ .gracefulShutdownTimeout }}
  - --log-format=json
  {{- range .extraArgs }}
  - {{ . | quote }}
  {{- end }}
  env:
  - name: POD_IP
    valueFrom: { fieldRef: { fieldPath: status.podIP } }
  ports:
  - { name: agent-udp, containerPort: {{ .ports.agent }}, protocol: UDP }
  - { name: agent-tcp, containerPort: {{ .ports.agent }}, protocol: TCP }
  - { name: health, containerPort: {{ .ports.health }} }
  {{- if not $static }}
  - { name: frontend, containerPort: {{ .frontend.port }} }
  {{- end }}
  # No readiness probe: a control plane starts before its nodes.
  livenessProbe:
    httpGet: { path: /healthz, port: {{ .ports.health }}{{ if $static }}, host: 127.0.0.1{{ end }} }
    timeoutSeconds: 5
  resources: {{ toJson .resources }}
  securityContext:
    {{- include "culvert.containerSecurity" . | nindent 4 }}
  volumeMounts:
  {{- if $static }}
  - { name: pki, mountPath: /etc/kubernetes/pki, readOnly: true }
  {{- if $needsKubeconfig }}
  - { name: kubeconfig, mountPath: {{ .kubeconfig }}, readOnly: true }
  {{- end }}
  - { name: socket, mountPath: {{ dir .socket }} }
volumes:
- { name: pki, hostPath: { path: /etc/kubernetes/pki, type: Directory } }
{{- if $needsKubeconfig }}
- { name: kubeconfig, hostPath: { path: {{ .kubeconfig }}, type: File } }
{{- end }}
- { name: socket, hostPath: { path: {{ dir .socket }}, type: DirectoryOrCreate } }
  {{- else }}
  - { name: frontend, mountPath: /etc/culvert/frontend, readOnly: true }
  - { name: server, mountPath: /etc/culvert/server, readOnly: true }
  {{- if ne .authentication "token" }}
  - { name: agent-ca, mountPath: /etc/culvert/agent-ca, readOnly: true }
  {{- end }}
  {{- if $needsKubeconfig }}
  - { name: kubeconfig, mountPath: /etc/culvert/kubeconfig, readOnly: true }
  {{- end }}
volumes:
- { name: frontend, secret: { secretName: {{ .frontend.secret }} } }
- { name: server, secret: { secretName: {{ .agentCertificate.secret }} } }
{{- if ne .authentication "token" }}
- { name: agent-ca, secret: { secretName: {{ required "server.agentCaSecret: set the Secret with ca.crt" .agentCaSecret }} } }
{{- end }}
{{- if $needsKubeconfig }}
- { name: kubeconfig, secret: { secretName: {{ .kubeconfigSecret }} } }
{{- end }}
  {{- end }}
{{- end }}
{{- end }}
