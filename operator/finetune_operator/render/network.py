"""Who may talk to trainer pods, and to whom they may talk (networking.k8s.io/v1); where those of several nodes meet."""

from finetune_api.constants import MASTER_PORT, TELEMETRY_PORT, Stage
from finetune_api.plan import Plan

from finetune_operator.observed import Manifest, Resource
from finetune_operator.plans import has_peers
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


def render_network_policy(resource: Resource, plan: Plan, settings: Settings) -> Manifest:
    """Denies all but this: the operator and Prometheus read the telemetry; train pods talk among themselves, and where
    there are several to DNS, to nobody else; prepare and publish, which download and upload, reach all but
    METADATA_SERVICES.
    """
    stage = plan.stage
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
            "egress": [{"to": egress}, *([_dns(settings)] if has_peers(plan) else [])],
        },
    }


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
