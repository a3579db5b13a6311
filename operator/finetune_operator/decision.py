"""What `reconcile.decide` answers, and what it knows beside the job itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune_api.constants import Stage
from finetune_api.status import FineTuneJobStatus

from finetune_operator.cluster import Event
from finetune_operator.layout import Layout
from finetune_operator.observed import Manifest
from finetune_operator.settings import Settings


@dataclass(frozen=True)
class Context:
    """What does not change from job to job."""

    settings: Settings
    layout: Layout


@dataclass(frozen=True)
class Decision:
    """What to do now. `create` is in order; all of it may be done twice without harm."""

    status: FineTuneJobStatus
    create: Sequence[Manifest] = ()
    change: Mapping[Stage, Manifest] = field(default_factory=dict)
    """Merge patches of child Jobs: fields that are to be others; None takes one away."""
    restart: Sequence[Stage] = ()
    """Child Jobs to delete, so that their stage runs again."""
    delete: bool = False
    """Delete the resource: its time to live is over."""
    events: Sequence[Event] = ()
    requeue_after: float | None = None
