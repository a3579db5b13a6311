"""Who may talk to trainer pods, and to whom they may talk (networking.k8s.io/v1)."""

from finetune_api.constants import TELEMETRY_PORT, Stage

from finetune_operator.observed import Manifest, Resource
from finetune_operator.render.metadata import identity_labels, render_metadata
from finetune_operator.settings import OPERATOR_LABELS, Settings

NAMESPACE_NAME = "kubernetes.io/metadata.name"
"""Label that the API server puts on every namespace."""

METADATA_SERVICES = {
    "0.0.0.0/0": ["169.254.169.254/32", "100.100.100.200/32"],
    "::/0": ["fd00:ec2::254/128", "fd20:ce::254/128"],
}
"""Network -> addresses in it where clouds hand out the node's own credentials (AWS, Azure and others; Alibaba;
AWS and Google on IPv6). A URI that a user wrote must not borrow them: credentials come by secretRef, or by a
token that the platform projects into the pod (IRSA, Azure Workload Identity)."""


def render_network_policy(resource: Resource, stage: Stage, settings: Settings) -> Manifest:
    """Denies all but this: the operator and Prometheus read the telemetry; train pods talk among themselves and to
    nobody else, not even to DNS; prepare and publish, which download and upload, reach all but METADATA_SERVICES.
    """
    own_pods: Manifest = {"podSelector": {"matchLabels": identity_labels(resource, stage)}}
    ingress: list[Manifest] = [{"from": _telemetry_readers(settings), "ports": [{"port": TELEMETRY_PORT}]}]
    if stage is Stage.TRAIN:
        ingress.append({"from": [own_pods]})
        egress: list[Manifest] = [own_pods]
    else:
        blocks = [{"ipBlock": {"cidr": cidr, "except": hidden}} for cidr, hidden in METADATA_SERVICES.items()]
        # in some networks (Cilium) an ipBlock is about addresses outside the cluster only: pods have their own line
        egress = [{"namespaceSelector": {}}, *blocks]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": render_metadata(resource, resource.child_name(stage), stage),
        "spec": {
            **own_pods,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": [{"to": egress}],
        },
    }


def _telemetry_readers(settings: Settings) -> list[Manifest]:
    operator = {
        "namespaceSelector": {"matchLabels": {NAMESPACE_NAME: settings.operator_namespace}},
        "podSelector": {"matchLabels": OPERATOR_LABELS},
    }
    if not settings.prometheus_namespace:
        return [operator]
    return [operator, {"namespaceSelector": {"matchLabels": {NAMESPACE_NAME: settings.prometheus_namespace}}}]
