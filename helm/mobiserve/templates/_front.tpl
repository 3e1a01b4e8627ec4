{{/* Limits as files/nghttpx-limits.conf has them; where it listens and whom it serves is here. */}}
{{- define "mobiserve.frontConfig" -}}
{{ .Files.Get "files/nghttpx-limits.conf" | trim }}
backend=127.0.0.1,{{ .Values.ports.data }};;proto=h2
{{- if .Values.tls.secretName }}
frontend=*,{{ .Values.front.port }}
private-key-file=/etc/mobiserve/tls/{{ .Values.tls.keyKey }}
certificate-file=/etc/mobiserve/tls/{{ .Values.tls.certKey }}
{{- with .Values.tls.clientCaKey }}
verify-client=yes
verify-client-cacert=/etc/mobiserve/tls/{{ . }}
{{- end }}
{{- else }}
frontend=*,{{ .Values.front.port }};no-tls
{{- end }}
{{- end -}}
