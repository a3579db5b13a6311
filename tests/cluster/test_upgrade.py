"""What an earlier version of the operator has made is brought up to date by this one."""

import json
from typing import Any

from finetune_api.constants import HASH_ANNOTATION

from tests.cluster import kit
from tests.cluster.workbench import Workbench, tiny_classification

KINDS = ("configmap", "service", "networkpolicy")


def test_children_of_an_earlier_version_are_replaced_when_their_stage_begins_again(workbench: Workbench) -> None:
    beyond_every_node = {"nodes": 2, "gpus": 16}  # so that no pod needs time to end
    queued = {"queueName": "of-nobody"}  # a queued training that is suspended loses its Job and keeps the rest
    name = workbench.submit(
        tiny_classification(resources=beyond_every_node, scheduling=queued, workspace={"claimName": "models"})
    )
    child = f"{name}-train"

    def train_job() -> dict[str, Any] | None:
        return kit.get("job", child, workbench.namespace)

    def children() -> dict[str, Any]:
        found = {kind: kit.get(kind, child, workbench.namespace) or {} for kind in KINDS}
        return {
            kind: (one["metadata"]["annotations"][HASH_ANNOTATION], one.get("data"), one.get("spec"))
            for kind, one in found.items()
        }

    kit.wait_until(train_job, 120, "the train Job", lambda: kit.describe(workbench.namespace, name))
    workbench.set(name, suspend=True)
    kit.wait_until(lambda: train_job() is None, 150, "no train Job", lambda: kit.describe(workbench.namespace, name))
    made = children()
    for kind, path, value in (
        ("configmap", "/data/old", "x"),
        ("service", "/spec/ports/0/name", "old"),
        ("networkpolicy", "/spec/egress/0", {}),
    ):
        annotation = HASH_ANNOTATION.replace("/", "~1")
        patch = [
            {"op": "replace", "path": f"/metadata/annotations/{annotation}", "value": "of an earlier version"},
            {"op": "add", "path": path, "value": value},
        ]
        kit.kubectl("-n", workbench.namespace, "patch", kind, child, "--type=json", "-p", json.dumps(patch))
    assert not any(one in made.values() for one in children().values())
    workbench.set(name, suspend=False)
    kit.wait_until(train_job, 60, "the train Job again", lambda: kit.describe(workbench.namespace, name))
    assert children() == made
    workbench.delete(name)
