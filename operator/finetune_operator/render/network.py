"""Who may talk to trainer pods, and to whom they may talk (networking.k8s.io/v1); where those of several nodes meet.

NetworkPolicies add up. Two are for all trainer pods of a namespace: they come with its first job and stay when the
jobs go, so that no pod is without them, not even one that still saves when its job was deleted. Only several nodes need
a third, their job's own: each policy is work for the network's agent on every node.
"""

from collections.abc import Sequence

from finetune_api.constants import MASTER_PORT, STAGE_LABEL, TELEMETRY_PORT, Stage
from finetune_api.plan import Plan

from finetune_operator.observed import Manifest, Resource
from finetune_operator.render.metadata import identity_labels, render_metadata, render_shared_metadata, seal
from finetune_operator.settings import OPERATOR_LABELS, Settings

GUARD = "finetune-trainers"
TRANSFERS = "finetune-transfers"
"""Names of the two in every namespace with jobs. A child of a job ends with a stage or with `workspace`."""

NAMESPACE_NAME = "kubernetes.io/metadata.name"
"""Label that the API server puts on every namespace."""

METADATA_SERVICES = {
    "0.0.0.0/0": ["169.254.169.254/32", "100.100.100.200/32"],
    "::/0": ["fd00:ec2::254/128", "fd20:ce::254/128"],
}
"""Network -> addresses in it where clouds hand out the node's own credentials (AWS, Azure and others; Alibaba;
AWS and Google on IPv6). A URI that a user wrote must not borrow them: credentials come by secretRef, or by a
token that the platform projects into the pod (IRSA, Azure Workload Identity)."""


DNS_PODS = {
    "namespaceSelector": {"matchLabels": {NAMESPACE_NAME: "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}
"""CoreDNS has this label too."""


def render_service(resource: Resource, plan: Plan) -> Manifest:
    """The headless Service that gives each of a stage's pods a name: <job>-<index>.<this>.

    A pod is not ready before it has met the others, so they must find it before it is.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": render_metadata(resource, resource.child_name(plan.stage), plan.stage),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": identity_labels(resource, plan.stage),
            "ports": [{"name": "rendezvous", "port": MASTER_PORT}],
        },
    }


def render_policies(resource: Resource, stage: Stage, settings: Settings, *, peers: bool) -> list[Manifest]:
    """All that a stage's pods need, sealed; `peers`: it is training on several nodes, whose pods talk to each other."""
    namespace = resource.key.namespace
    policies = [_guard(namespace, settings)]
    if stage is not Stage.TRAIN:
        policies.append(_transfers(namespace))
    if peers:
        policies.append(_peers(resource, stage, settings))
    return [seal(policy) for policy in policies]


def _guard(namespace: str, settings: Settings) -> Manifest:
    """Denies trainer pods all but this: the operator and Prometheus read the telemetry."""
    return _policy(
        render_shared_metadata(namespace, GUARD),
        selector={"matchExpressions": [{"key": STAGE_LABEL, "operator": "Exists"}]},
        ingress=[{"from": _telemetry_readers(settings), "ports": [{"port": TELEMETRY_PORT}]}],
        egress=[],
    )


def _transfers(namespace: str) -> Manifest:
    """Prepare and publish, which download and upload, reach all but METADATA_SERVICES."""
    blocks = [{"ipBlock": {"cidr": cidr, "except": hidden}} for cidr, hidden in METADATA_SERVICES.items()]
    stages = [stage.value for stage in Stage if stage is not Stage.TRAIN]
    return _policy(
        render_shared_metadata(namespace, TRANSFERS),
        selector={"matchExpressions": [{"key": STAGE_LABEL, "operator": "In", "values": stages}]},
        # in some networks (Cilium) an ipBlock is about addresses outside the cluster only: pods have their own line
        egress=[{"to": [{"namespaceSelector": {}}, *blocks]}],
    )


def _peers(resource: Resource, stage: Stage, settings: Settings) -> Manifest:
    """The pods of several nodes talk among themselves, and find each other by the DNS."""
    own = {"matchLabels": identity_labels(resource, stage)}
    return _policy(
        render_metadata(resource, resource.child_name(stage), stage),
        selector=own,
        ingress=[{"from": [{"podSelector": own}]}],
        egress=[{"to": [{"podSelector": own}]}, _dns(settings)],
    )


def _policy(
    metadata: Manifest,
    *,
    selector: Manifest,
    ingress: Sequence[Manifest] | None = None,
    egress: Sequence[Manifest] | None = None,
) -> Manifest:
    """Of the directions that are given, no pod of the selector has any more than its policies allow."""
    rules = {"ingress": ingress, "egress": egress}
    given = {direction: allowed for direction, allowed in rules.items() if allowed is not None}
    types = [direction.title() for direction in given]
    spec = {"podSelector": selector, "policyTypes": types, **given}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def _dns(settings: Settings) -> Manifest:
    """An egress rule: the pods of several nodes find each other by name."""
    return {
        "to": [DNS_PODS, *({"ipBlock": {"cidr": cidr}} for cidr in settings.dns_cidrs)],
        "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}],
    }


def _telemetry_readers(settings: Settings) -> list[Manifest]:
    operator = {
        "namespaceSelector": {"matchLabels": {NAMESPACE_NAME: settings.operator_namespace}},
        "podSelector": {"matchLabels": OPERATOR_LABELS},
    }
    if not settings.prometheus_namespace:
        return [operator]
    return [operator, {"namespaceSelector": {"matchLabels": {NAMESPACE_NAME: settings.prometheus_namespace}}}]
