"""What the operator's installation decides: read once, from the environment that the Helm chart writes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

OPERATOR_LABELS = {"app.kubernetes.io/name": "finetune-operator"}
"""Labels of the operator's own pods: trainer pods admit these, and no others of that namespace."""


@dataclass(frozen=True)
class Settings:
    trainer_image: str = "finetune-trainer"
    trainer_pull_policy: str = "IfNotPresent"
    trainer_pull_secrets: tuple[str, ...] = ()
    dns_cidrs: tuple[str, ...] = ()
    """Addresses of the cluster's DNS, where it is not only pods of kube-system labelled k8s-app: kube-dns."""
    operator_namespace: str = "finetune-system"
    watch_namespaces: tuple[str, ...] = ()
    """Empty: all namespaces."""
    prometheus_namespace: str = ""
    """Namespace whose pods may scrape trainer pods; empty: none."""
    identity: str = "finetune-operator"
    """Name of this replica, as the Lease shows it."""
    lease_name: str = "finetune-operator"
    http_port: int = 8080
    poll_seconds: float = 5.0
    kueue: bool = False
    """Whether Kueue's Workloads may be read, to say why a training waits in its queue."""
    log_level: str = "INFO"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Raises ValueError with the variable's name for a number that is none."""

        def text(name: str, default: str) -> str:
            return environment.get(f"FINETUNE_{name}") or default

        def names(name: str) -> tuple[str, ...]:
            return tuple(part.strip() for part in text(name, "").split(",") if part.strip())

        def number(name: str, default: float) -> float:
            try:
                return float(text(name, str(default)))
            except ValueError:
                raise ValueError(f"FINETUNE_{name}={text(name, '')!r} is not a number") from None

        return cls(
            trainer_image=text("TRAINER_IMAGE", cls.trainer_image),
            trainer_pull_policy=text("TRAINER_PULL_POLICY", cls.trainer_pull_policy),
            trainer_pull_secrets=names("TRAINER_PULL_SECRETS"),
            dns_cidrs=names("DNS_CIDRS"),
            operator_namespace=text("POD_NAMESPACE", cls.operator_namespace),
            watch_namespaces=names("WATCH_NAMESPACES"),
            prometheus_namespace=text("PROMETHEUS_NAMESPACE", cls.prometheus_namespace),
            identity=text("POD_NAME", cls.identity),
            lease_name=text("LEASE_NAME", cls.lease_name),
            http_port=int(number("HTTP_PORT", cls.http_port)),
            kueue=text("KUEUE", "false").lower() == "true",
            poll_seconds=number("POLL_SECONDS", cls.poll_seconds),
            log_level=text("LOG_LEVEL", cls.log_level).upper(),
        )
