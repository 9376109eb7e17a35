{{/* What the schema cannot say: values that only fit together. */}}
{{- define "culvert.checks" -}}
{{- $agent := .Values.agent }}
{{- $server := .Values.server }}
{{- include "culvert.checkGrace" (list "agent.terminationGracePeriodSeconds" $agent.terminationGracePeriodSeconds "agent.drainTimeout" $agent.drainTimeout) }}
{{- include "culvert.checkGrace" (list "server.terminationGracePeriodSeconds" $server.terminationGracePeriodSeconds "server.gracefulShutdownTimeout" $server.gracefulShutdownTimeout) }}
{{- if $agent.enabled }}
{{- if or (contains "/" $agent.serverHost) (regexMatch "^[^:]+:[0-9]+$" $agent.serverHost) }}
{{- fail "agent.serverHost: give an address or a name alone; the port is agent.serverPort" }}
{{- end }}
{{- end }}
{{- if and $agent.enabled $server.enabled }}
{{- include "culvert.checkPair" . }}
{{- end }}
{{- end }}

{{/* Agents and servers of one release. */}}
{{- define "culvert.checkPair" -}}
{{- $agent := .Values.agent }}
{{- $server := .Values.server }}
{{- if and (ne $server.authentication "certificate") (ne $server.agentNamespace .Release.Namespace) }}
{{- fail (printf "server.agentNamespace: the agents of this release are in the namespace %s, and tokens of %s would be accepted alone: set it, or --namespace" .Release.Namespace $server.agentNamespace) }}
{{- end }}
{{- if and (ne $agent.authentication "both") (ne $agent.authentication $server.authentication) }}
{{- fail (printf "agent.authentication: %s, but server.authentication: %s: the servers would refuse all agents" $agent.authentication $server.authentication) }}
{{- end }}
{{- if and (eq $server.agentIdentity "node") (eq $agent.kind "Deployment") }}
{{- fail "server.agentIdentity: node is for agents of a DaemonSet, whose ids are the names of their nodes" }}
{{- end }}
{{- if or (eq $server.agentIdentity "certificate") (and (eq $server.agentIdentity "node") (eq $agent.authentication "certificate")) }}
{{- fail "server.agentIdentity: all agents share the certificate of agent.certificateSecret, so it cannot prove their ids: use tokens with node, or any" }}
{{- end }}
{{- if and $agent.countServerLeases (not $server.leases) }}
{{- fail "agent.countServerLeases: needs server.leases" }}
{{- end }}
{{- end }}

{{/* A list of a period's name and seconds, and of a timeout's name and duration. Only whole seconds and minutes are compared. */}}
{{- define "culvert.checkGrace" -}}
{{- $timeout := index . 3 }}
{{- $seconds := -1 }}
{{- if regexMatch "^[0-9]+s$" $timeout }}
{{- $seconds = trimSuffix "s" $timeout | int }}
{{- else if regexMatch "^[0-9]+m$" $timeout }}
{{- $seconds = mul 60 (trimSuffix "m" $timeout | int) }}
{{- end }}
{{- if le (index . 1 | int) (int $seconds) }}
{{- fail (printf "%s: must be above %s, %s: kubelet would end the process before its connections" (index . 0) (index . 2) $timeout) }}
{{- end }}
{{- end }}
