"""The few Kubernetes types that a spec carries through to pods, bounded so that CEL can compare them.

Meanings and names are those of core/v1 (https://kubernetes.io/docs/reference/kubernetes-api/).
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema

from finetune_api.base import Document, Rule

# What the API server would refuse in a child of the last stages must not be found out after a training.
_DNS_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DOMAIN = f"{_DNS_LABEL}([.]{_DNS_LABEL})*"
_QUALIFIED = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
NAME = f"^{_DOMAIN}$"
QUANTITY = "^([0-9]+|[0-9]*[.][0-9]+)([eE][-+]?[0-9]{1,2}|[numkMGTPE]|[KMGTPE]i)?$"
Quantity = Annotated[
    str,
    StringConstraints(pattern=QUANTITY, max_length=32),
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": QUANTITY, "maxLength": 32, "minimum": 0}),
]
Name = Annotated[str, StringConstraints(pattern=NAME, max_length=253)]
LabelKey = Annotated[str, StringConstraints(pattern=f"^({_DOMAIN}/)?{_QUALIFIED}$", max_length=317)]
RESOURCE_NAME = f"^{_DOMAIN}/{_QUALIFIED}$"
ResourceName = Annotated[str, StringConstraints(pattern=RESOURCE_NAME, max_length=317)]
LabelValue = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
Quantities = Annotated[dict[str, Quantity], Field(max_length=16)]
Labels = Annotated[dict[str, LabelValue], Field(max_length=32)]


class LocalReference(Document):
    name: Name = Field(description="Name of an object in the job's own namespace.")


# Others cannot be promised to more than one, so a limit is all that Kubernetes takes; with it comes the request.
RESOURCE_RULES = (
    Rule("!has(self.requests) || self.requests.all(name, name in ['cpu', 'memory', 'ephemeral-storage'])",
         "a request is one of cpu, memory and ephemeral-storage; name other resources in limits, which are their requests as well", "requests"),
    Rule("!has(self.limits) || self.limits.all(name, name in ['cpu', 'memory', 'ephemeral-storage'] "
         f"|| name.startsWith('hugepages-') || name.matches('{RESOURCE_NAME}') && string(self.limits[name]).matches('^[0-9]+$'))",
         "a limit is one of cpu, memory, ephemeral-storage and hugepages-<size>, or a whole number of a resource that a device plugin names, such as example.com/nic", "limits"),
    Rule("!has(self.requests) || !has(self.limits) || self.requests.all(name, !(name in self.limits) "
         "|| !quantity(string(self.requests[name])).isGreaterThan(quantity(string(self.limits[name]))))",
         "a request may not be greater than the limit of the same name", "requests"),
)


class ResourceRequirements(Document):
    rules: ClassVar = RESOURCE_RULES
    requests: Quantities | None = Field(None, description="What the container is promised, for example {cpu: 2, memory: 8Gi}.")
    limits: Quantities | None = Field(None, description="What the container may not exceed. Over the memory limit it is killed (OOMKilled).")


class Toleration(Document):
    key: LabelKey | None = Field(None, description="Taint key; unset with operator Exists matches every taint.")
    operator: Literal["Exists", "Equal"] | None = Field(None, description="Equal (the default) compares the value too.")
    value: LabelValue | None = Field(None, description="Taint value, for operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="Taint effect; unset matches all.")
    toleration_seconds: int | None = Field(None, ge=0, description="How long a NoExecute taint is tolerated.")


class SelectorRequirement(Document):
    key: LabelKey = Field(description="Label key.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(description="How key and values relate.")
    values: Annotated[list[LabelValue], Field(max_length=32)] | None = Field(None, description="Values for In, NotIn, Gt and Lt.")


class LabelSelector(Document):
    match_labels: Labels | None = Field(None, description="Labels that must all be equal.")
    match_expressions: Annotated[list[SelectorRequirement], Field(max_length=8)] | None = Field(None, description="Requirements that must all hold.")


class NodeSelectorTerm(Document):
    match_expressions: Annotated[list[SelectorRequirement], Field(max_length=8)] | None = Field(None, description="Requirements on node labels.")
    match_fields: Annotated[list[SelectorRequirement], Field(max_length=8)] | None = Field(None, description="Requirements on node fields.")


class NodeSelector(Document):
    node_selector_terms: Annotated[list[NodeSelectorTerm], Field(max_length=8)] = Field(description="Terms of which one must hold.")


class PreferredSchedulingTerm(Document):
    weight: int = Field(ge=1, le=100, description="Weight, 1 to 100.")
    preference: NodeSelectorTerm = Field(description="The preferred nodes.")


class NodeAffinity(Document):
    required_during_scheduling_ignored_during_execution: NodeSelector | None = Field(None, description="Nodes that qualify.")
    preferred_during_scheduling_ignored_during_execution: (
        Annotated[list[PreferredSchedulingTerm], Field(max_length=8)] | None
    ) = Field(None, description="Nodes that are preferred.")


class PodAffinityTerm(Document):
    label_selector: LabelSelector | None = Field(None, description="The pods that are looked at.")
    namespaces: Annotated[list[Name], Field(max_length=8)] | None = Field(None, description="Their namespaces; unset: the job's own.")
    topology_key: LabelKey = Field(description="Node label that says what 'the same place' means.")


class WeightedPodAffinityTerm(Document):
    weight: int = Field(ge=1, le=100, description="Weight, 1 to 100.")
    pod_affinity_term: PodAffinityTerm = Field(description="The preferred place.")


class PodAffinity(Document):
    required_during_scheduling_ignored_during_execution: (
        Annotated[list[PodAffinityTerm], Field(max_length=4)] | None
    ) = Field(None, description="Terms that must all hold.")
    preferred_during_scheduling_ignored_during_execution: (
        Annotated[list[WeightedPodAffinityTerm], Field(max_length=4)] | None
    ) = Field(None, description="Terms that are preferred.")


class Affinity(Document):
    node_affinity: NodeAffinity | None = Field(None, description="Nodes to run on, by their labels.")
    pod_affinity: PodAffinity | None = Field(None, description="Pods to run near to.")
    pod_anti_affinity: PodAffinity | None = Field(None, description="Pods to keep away from.")
