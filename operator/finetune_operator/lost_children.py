"""What a stage at work still needs and somebody has deleted. Pure.

That a NetworkPolicy is gone a watch tells. Of what only a starting pod needs, the scheduler and the kubelet tell when
one does not start; of the Service nobody does, so it is made again, if need be, whenever a pod is.
"""

from collections.abc import Iterator, Sequence

from finetune_api.constants import Stage

from finetune_operator.diagnose import waiting_trouble
from finetune_operator.observed import Manifest, Observed, is_pending, manifest_hash_of


def is_in_place(child: Manifest, observed: Observed) -> bool:
    """Whether it is a NetworkPolicy that is there already, and as it should be: most are shared by all jobs."""
    name = child["metadata"]["name"]
    return child["kind"] == "NetworkPolicy" and observed.policies.get(name) == manifest_hash_of(child)


def is_missing(kind: str, name: str, observed: Observed, stage: Stage) -> bool:
    """Whether a pod of the stage does not start because it has no such object."""
    return any(f'{kind.lower()} "{name}" not found' in trouble for trouble in _troubles(observed, stage))


def lacks_something(observed: Observed, stage: Stage) -> bool:
    return any("not found" in trouble for trouble in _troubles(observed, stage))


def _troubles(observed: Observed, stage: Stage) -> Iterator[str]:
    for pod in observed.pods.get(stage, ()):
        trouble = waiting_trouble(pod, observed.events) if is_pending(pod) else None
        if trouble is not None:
            yield trouble.message


def lost_children(
    children: Sequence[Manifest], observed: Observed, stage: Stage, *, interrupted: bool
) -> tuple[Manifest, ...]:
    """Those of the stage's `children` that are to be made again; `interrupted`: its pod has only just ended."""

    def is_lost(child: Manifest) -> bool:
        match child["kind"]:
            case "Job":
                return False
            case "NetworkPolicy":
                return not is_in_place(child, observed)
            case "Service":
                return interrupted
            case kind:
                return is_missing(kind, child["metadata"]["name"], observed, stage)

    return tuple(filter(is_lost, children))
