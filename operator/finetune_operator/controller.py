"""One turn of the loop: observe, decide, act. The same for a cluster and for `finetune run`."""

import logging
from dataclasses import replace

from finetune_api.constants import Phase, Reason

from finetune_operator.cluster import Cluster, ForbiddenError, NameClashError, RejectedError
from finetune_operator.decision import Context, Decision
from finetune_operator.observed import Key, Observed, Resource
from finetune_operator.reconcile import decide, give_up, hold_back

logger = logging.getLogger(__name__)


async def reconcile(cluster: Cluster, key: Key, context: Context, now: float) -> float | None:
    """Brings one job a step on; returns the seconds after which to look again, None to wait for an event.

    Children are created before the status tells of them, so that a crash in between repeats what is idempotent
    and loses nothing. Raises UnavailableError (and what the cluster raises): the caller tries again, later.
    """
    for is_fresh in (False, True):
        found = await cluster.observe(key)
        if found is None:
            return None
        resource, observed = found
        decision = decide(resource, observed, now, context)
        if is_fresh or _is_new(resource, observed) or not _is_grave(decision, resource):
            break
        await cluster.refresh(key)
    if decision.delete:
        await cluster.delete(resource)
        return None
    try:
        decision = await _act(cluster, resource, observed, decision, now)
    except ForbiddenError as error:
        await _tell(cluster, resource, hold_back(resource, decision, now, str(error)))
        raise
    await _tell(cluster, resource, decision)
    return decision.requeue_after


def _is_grave(decision: Decision, resource: Resource) -> bool:
    """Whether it would do harm if it rested on old news: it starts or deletes something, or gives the job up."""
    gives_up = decision.status.phase is Phase.FAILED and resource.status.phase is not Phase.FAILED
    return bool(decision.create or decision.restart or decision.delete) or gives_up


def _is_new(resource: Resource, observed: Observed) -> bool:
    """Nothing was ever done about it, as far as is known: if that is old news, all there is to create is there already.

    To look it up once more would cost a quarter of the time until its first child, and many come at once.
    """
    return resource.status.phase is None and not observed.jobs


async def _tell(cluster: Cluster, resource: Resource, decision: Decision) -> None:
    for event in decision.events:
        cluster.emit(resource, event)
    if decision.status != resource.status:
        await cluster.write_status(resource, decision.status)


async def _act(cluster: Cluster, resource: Resource, observed: Observed, decision: Decision, now: float) -> Decision:
    """Changes the children; a child that can never be made fails the job."""
    worked_out = replace(resource, status=decision.status)
    try:
        for manifest in decision.create:
            await cluster.create(resource, manifest)
    except NameClashError as error:
        decision = give_up(worked_out, observed, now, Reason.NAME_CLASH, str(error))
    except RejectedError as error:
        decision = give_up(worked_out, observed, now, Reason.INVALID_SPEC, str(error))
    for stage, changes in decision.change.items():
        await cluster.change_job(resource, stage, changes)
    for stage in decision.restart:
        await cluster.delete_child(resource, stage)
    return decision
