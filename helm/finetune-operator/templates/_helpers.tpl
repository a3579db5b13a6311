{{/* Prefix of every name: the release's name, with the chart's name unless it says so already. */}}
{{- define "finetune.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride }}
{{- else if contains .Chart.Name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* The trainers' NetworkPolicies admit pods by app.kubernetes.io/name: it must not be configurable. */}}
{{- define "finetune.selectorLabels" -}}
app.kubernetes.io/name: finetune-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "finetune.labels" -}}
{{- with .Values.commonLabels }}
{{- toYaml . }}
{{ end }}
{{- include "finetune.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "finetune.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "finetune.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- define "finetune.subjects" -}}
- kind: ServiceAccount
  name: {{ include "finetune.serviceAccountName" . }}
  namespace: {{ .Release.Namespace }}
{{- end }}

{{/* A reference to an image; call it with (dict "image" .Values.image "root" .). */}}
{{- define "finetune.image" -}}
{{- if .image.digest }}
{{- printf "%s@%s" .image.repository .image.digest }}
{{- else }}
{{- printf "%s:%s" .image.repository (.image.tag | default .root.Chart.AppVersion) }}
{{- end }}
{{- end }}

{{/* Names of a list of {name: ...}, comma separated. */}}
{{- define "finetune.names" -}}
{{- $names := list }}
{{- range . }}{{- $names = append $names .name }}{{- end }}
{{- join "," $names }}
{{- end }}

{{/* What the operator may do where FineTuneJobs live. Secrets are not among it: the kubelet mounts them. */}}
{{- define "finetune.rules" -}}
- apiGroups: [finetune-operator.io]
  resources: [finetunejobs]
  verbs: [list, watch, delete] # delete: limits.ttlSecondsAfterFinished
- apiGroups: [finetune-operator.io]
  resources: [finetunejobs/status]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [persistentvolumeclaims]
  verbs: [get, create]
- apiGroups: [""]
  resources: [configmaps, services] # services: of trainings on several nodes
  verbs: [get, create, update] # update: one that an earlier version of the operator has made
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, update] # watch: one that is deleted is made again at once
- apiGroups: [""]
  resources: [events]
  verbs: [list, create] # list: the scheduler's and the kubelet's words about a pod
{{- if .Values.kueue.enabled }}
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list]
{{- end }}
{{- end }}
