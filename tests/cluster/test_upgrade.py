"""What an earlier version of the operator has made is brought up to date by this one."""

import json
from typing import Any

from finetune_api.constants import HASH_ANNOTATION
from finetune_operator.render.network import GUARD

from tests.cluster import kit
from tests.cluster.workbench import Workbench, tiny_classification


def test_children_of_an_earlier_version_are_replaced_when_their_stage_begins_again(workbench: Workbench) -> None:
    beyond_every_node = {"nodes": 2, "gpus": 16}  # so that no pod needs time to end
    queued = {"queueName": "of-nobody"}  # a queued training that is suspended loses its Job and keeps the rest
    name = workbench.submit(
        tiny_classification(resources=beyond_every_node, scheduling=queued, workspace={"claimName": "models"})
    )
    child = f"{name}-train"
    outdated = (
        ("configmap", child, "/data/old", "x"),
        ("service", child, "/spec/ports/0/name", "old"),
        ("networkpolicy", child, "/spec/egress/0", {}),
        ("networkpolicy", GUARD, "/spec/ingress/0", {}),
    )

    def train_job() -> dict[str, Any] | None:
        return kit.get("job", child, workbench.namespace)

    def children() -> dict[str, Any]:
        found = {f"{kind}/{which}": kit.get(kind, which, workbench.namespace) or {} for kind, which, _, _ in outdated}
        return {
            which: (one["metadata"]["annotations"][HASH_ANNOTATION], one.get("data"), one.get("spec"))
            for which, one in found.items()
        }

    kit.wait_until(train_job, 120, "the train Job", lambda: kit.describe(workbench.namespace, name))
    workbench.set(name, suspend=True)
    kit.wait_until(lambda: train_job() is None, 150, "no train Job", lambda: kit.describe(workbench.namespace, name))
    made = children()
    for kind, which, path, value in outdated:
        annotation = HASH_ANNOTATION.replace("/", "~1")
        patch = [
            {"op": "replace", "path": f"/metadata/annotations/{annotation}", "value": "of an earlier version"},
            {"op": "add", "path": path, "value": value},
        ]
        kit.kubectl("-n", workbench.namespace, "patch", kind, which, "--type=json", "-p", json.dumps(patch))
    assert not any(one in made.values() for one in children().values())
    workbench.set(name, suspend=False)
    kit.wait_until(train_job, 60, "the train Job again", lambda: kit.describe(workbench.namespace, name))
    assert children() == made
    workbench.delete(name)
