{{- define "mobiserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Leaves room for the longest suffix below 63 characters. */}}
{{- define "mobiserve.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains (include "mobiserve.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "mobiserve.name" .) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "mobiserve.selectorLabels" -}}
app.kubernetes.io/name: {{ include "mobiserve.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Of the pods that serve: the test pod carries the selector labels' names too. */}}
{{- define "mobiserve.podSelectorLabels" -}}
{{ include "mobiserve.selectorLabels" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "mobiserve.labels" -}}
{{ include "mobiserve.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "mobiserve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "mobiserve.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "mobiserve.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default (printf "%s-cpu" .Chart.AppVersion) .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "mobiserve.frontImage" -}}
{{- default (printf "%s:%s-front" .Values.image.repository .Chart.AppVersion) .Values.front.image -}}
{{- end -}}

{{- define "mobiserve.policyConfigMap" -}}
{{- default (printf "%s-policy" (include "mobiserve.fullname" .)) .Values.policy.existingConfigMap -}}
{{- end -}}

{{/* The model folder inside the server's container. */}}
{{- define "mobiserve.modelDir" -}}
{{- if eq .Values.checkpoint.source "demo" -}}
/usr/share/mobiserve/demo
{{- else -}}
{{- printf "/checkpoint/%s" .Values.checkpoint.path | trimSuffix "/" -}}
{{- end -}}
{{- end -}}

{{/* The port of the pod that clients reach. */}}
{{- define "mobiserve.clientPort" -}}
{{- if .Values.front.enabled }}front{{ else }}data{{ end -}}
{{- end -}}

{{/* Whether the server itself speaks TLS; with a front proxy that one does. */}}
{{- define "mobiserve.serverTls" -}}
{{- if and .Values.tls.secretName (not .Values.front.enabled) }}true{{ end -}}
{{- end -}}

{{/* The name that the certificate must have, whatever address leads to it. */}}
{{- define "mobiserve.serverName" -}}
{{- default (printf "%s.%s.svc" (include "mobiserve.fullname" .) .Release.Namespace) .Values.tls.probe.serverName -}}
{{- end -}}

{{/* Flags of mobictl under TLS as its environment, so that people who exec it need none. */}}
{{- define "mobiserve.ctlEnv" -}}
- name: MOBICTL_TLS_CA
  value: /etc/mobiserve/tls/{{ .Values.tls.probe.caKey }}
- name: MOBICTL_TLS_SERVER_NAME
  value: {{ include "mobiserve.serverName" . }}
{{- if .Values.tls.clientCaKey }}
- name: MOBICTL_TLS_CERT
  value: /etc/mobiserve/tls/{{ .Values.tls.certKey }}
- name: MOBICTL_TLS_KEY
  value: /etc/mobiserve/tls/{{ .Values.tls.keyKey }}
{{- end }}
{{- end -}}

{{/* How the kubelet asks for health: natively, or through mobictl since its probe knows no TLS.
     Call with the root and the service's name. */}}
{{- define "mobiserve.probe" -}}
{{- $root := index . 0 -}}
{{- $service := index . 1 -}}
{{- if include "mobiserve.serverTls" $root -}}
exec:
  command:
    - mobictl
    - health
    {{- with $service }}
    - {{ . }}
    {{- end }}
    - --server=127.0.0.1:{{ $root.Values.ports.data }}
    - --timeout_s=3
{{- else -}}
grpc:
  port: {{ $root.Values.ports.data }}
  service: {{ $service | quote }}
{{- end }}
periodSeconds: {{ $root.Values.probes.periodSeconds }}
timeoutSeconds: {{ $root.Values.probes.timeoutSeconds }}
{{- end -}}

{{- define "mobiserve.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* What no schema can say, or not so that one understands it. */}}
{{- define "mobiserve.check" -}}
{{- $s := .Values.shutdown -}}
{{- if gt (add $s.preStopSeconds $s.drainSeconds 5 | int) (int $s.graceSeconds) -}}
{{- fail "shutdown: graceSeconds must be at least preStopSeconds + drainSeconds + 5" -}}
{{- end -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) -}}
{{- fail "autoscaling: minReplicas is above maxReplicas" -}}
{{- end -}}
{{- if and .Values.autoscaling.keda.enabled .Values.autoscaling.hpa.enabled -}}
{{- fail "autoscaling: keda and hpa exclude each other, KEDA makes an HPA of its own" -}}
{{- end -}}
{{- if and (eq (int .Values.strategy.maxSurge) 0) (eq (int .Values.strategy.maxUnavailable) 0) -}}
{{- fail "strategy: maxSurge and maxUnavailable cannot both be 0" -}}
{{- end -}}
{{- end -}}
