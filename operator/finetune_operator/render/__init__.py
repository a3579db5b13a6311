"""FineTuneJob -> the Kubernetes objects of one stage. Pure: dicts in, dicts out.

network   who may talk to the stage's pods, and to whom they may talk; the name by which several nodes find each other
storage   the workspace's volume, and what a pod mounts
pod       the pod template: the restricted Pod Security level in full
job       the batch/v1 Job: retries, failure policy, queue
metadata  names, labels, owner and hash of all of them
"""

from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.layout import Layout
from finetune_operator.observed import Manifest, Resource, merge_patch, suspension
from finetune_operator.plans import has_peers
from finetune_operator.render.job import render_job
from finetune_operator.render.metadata import render_metadata, seal
from finetune_operator.render.network import render_policies, render_service
from finetune_operator.render.storage import render_workspace
from finetune_operator.settings import Settings


def render_stage(
    resource: Resource, spec: FineTuneJobSpec, plan: Plan, settings: Settings, layout: Layout, *, suspended: bool
) -> list[Manifest]:
    """What `plan.stage` needs, in the order of its creation: NetworkPolicies first, the Job last.

    The workspace's claim is a child of prepare, unless the spec names a claim. Each manifest carries the hash of
    itself; the Job's own leaves out `suspend`, which changes during a job's life.
    """
    children = [
        _plan_config_map(resource, plan),
        *([render_service(resource, plan)] if has_peers(plan) else []),
        render_job(resource, spec, plan, settings, layout.plan_path(resource, plan.stage)),
    ]
    if plan.stage is Stage.PREPARE and spec.workspace.claim_name is None:
        children.insert(0, render_workspace(resource, spec))
    children = [seal(child) for child in children]
    children[-1] = merge_patch(children[-1], suspension(suspended))
    return [*render_policies(resource, plan.stage, settings, peers=has_peers(plan)), *children]


def _plan_config_map(resource: Resource, plan: Plan) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": render_metadata(resource, resource.child_name(plan.stage), plan.stage),
        "data": {"plan.json": plan.to_json(indent=2)},
    }
