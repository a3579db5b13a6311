"""Whatever a spec holds that the CRD lets through, and whatever a trainer says: the operator knows what to do with it, its
children are what they should be, and its status fits the schema.
"""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from finetune_api.constants import MASTER_PORT, Phase, Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import PrepareResult
from finetune_api.rules import InvalidManifestError, parse_job
from finetune_operator.observed import Key
from hypothesis import HealthCheck, assume, given, settings

from tests.crd_fuzz import INJECTIONS, jobs, schema
from tests.fake_cluster import DATA, MODEL, TRAINED, FakeCluster, failure, success
from tests.specs import Manifest

LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
MOUNTS = re.compile(
    r"/(plan|tmp|dev/shm|workspace(/[-a-z0-9]+)?|sources/(pvc|configmap)/[-a-z0-9.]+|secrets/[-a-z0-9.]+)"
)
STATUS = jsonschema.Draft4Validator(schema()["properties"]["status"])


def check_child(child: Manifest, job: str) -> None:
    """What the API server would look at, and that no text of the spec has become a command."""
    metadata = child["metadata"]
    assert DNS_LABEL.fullmatch(metadata["name"])
    assert all(LABEL_VALUE.fullmatch(value) for value in metadata["labels"].values())
    json.dumps(child).encode()
    if child["kind"] == "ConfigMap":
        plan = child["data"]["plan.json"]
        assert Plan.model_validate_json(plan).job.name == job
    if child["kind"] == "Job":
        pod = child["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        stage = metadata["labels"]["finetune-operator.io/stage"]
        assert "command" not in container
        assert container["args"] == [stage, "--plan", "/plan/plan.json"]
        values = {variable.get("value") for variable in container.get("env", ())} - {None}
        assert values <= {f"{job}-train-0.{job}-train", str(MASTER_PORT)}
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert len(set(mounts)) == len(mounts)
        assert all(MOUNTS.fullmatch(path) and "/.." not in path for path in mounts)
        assert all(DNS_LABEL.fullmatch(volume["name"]) for volume in pod["volumes"])


def check_status(cluster: FakeCluster) -> None:
    if cluster.body is not None:  # a job may ask to be deleted at its end
        status = cluster.status
        assert status.conditions
        STATUS.validate(status.to_dict())


def lives(examples: int) -> Callable[[], None]:
    """A test of so many jobs."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(jobs())
    def live(job: Manifest) -> None:
        try:
            spec = parse_job(job).spec
        except InvalidManifestError:
            assume(False)
        name = job["metadata"]["name"]
        cluster = FakeCluster(spec.to_dict(), key=Key("team", name))
        asyncio.run(cluster.live())
        if spec.managed_by is None:
            check_status(cluster)
        for child in cluster.created:
            check_child(child, name)

    return live


def test_any_job_has_a_life() -> None:
    lives(60)()


@pytest.mark.long
def test_very_many_jobs_have_a_life() -> None:
    lives(2000)()


@pytest.mark.parametrize("word", INJECTIONS)
async def test_whatever_a_trainer_says_the_status_fits_the_schema(word: str) -> None:
    long = (word * 200)[:200]
    data = DATA.model_copy(update={"labels": [word, f"not {word}"]})
    model = MODEL.model_copy(update={"architecture": word})
    trained = TRAINED.model_copy(update={"device": long, "stopped_early": word, "batching": long})
    results = {
        Stage.PREPARE: success(Stage.PREPARE).model_copy(update={"prepare": PrepareResult(data=data, model=model)}),
        Stage.TRAIN: success(Stage.TRAIN).model_copy(update={"train": trained}),
        Stage.PUBLISH: success(Stage.PUBLISH),
    }
    cluster = FakeCluster()
    await cluster.live(results)
    check_status(cluster)
    assert cluster.status.data == data


@pytest.mark.parametrize("word", INJECTIONS)
async def test_whatever_a_failure_is_called_the_status_fits_the_schema(word: str) -> None:
    broken = FakeCluster()
    await broken.settle()
    broken.start(Stage.PREPARE)
    broken.say(Stage.PREPARE, fraction=0.5, device=word)
    await broken.settle()
    check_status(broken)
    said = failure(Stage.PREPARE, Reason.DATA_INVALID, word * 999)
    broken.crash(Stage.PREPARE, 64, said=said, final=True)
    await broken.settle()
    check_status(broken)
    assert word.strip()[:9] in (broken.status.message or "")


@pytest.mark.parametrize(
    ("stage", "field", "value"),
    [
        (Stage.PREPARE, "data", {"tokens": 10**30}),
        (Stage.PREPARE, "data", {"labels": ["x"] * 33}),
        (Stage.PREPARE, "model", {"parameters": -(2**63) - 1}),
        (Stage.TRAIN, "precision", "$(id)"),
        (Stage.TRAIN, "split", "x" * 33),
        (Stage.TRAIN, "baseline", "x" * 65),
        (Stage.TRAIN, "scores", [{"metric": "loss", "value": "1"}] * 17),
        (Stage.TRAIN, "scores", [{"metric": "loss", "value": "$(id)"}]),
        (Stage.TRAIN, "stoppedEarly", "x" * 3000),
        (Stage.TRAIN, "peakMemoryBytes", 2**63),
        (Stage.PUBLISH, "artifact", {"uri": "x" * 1025}),
    ],
)
async def test_a_result_that_no_trainer_of_ours_writes_breaks_nothing(stage: Stage, field: str, value: Any) -> None:
    """Code of a model, where the spec trusts it, could write one. At worst the stage runs again."""
    cluster = FakeCluster()
    await cluster.pass_through(*(before for before in Stage if list(Stage).index(before) < list(Stage).index(stage)))
    cluster.start(stage)
    await cluster.settle()
    cluster.finish(stage)
    end = cluster.pods[stage][0]["status"]["containerStatuses"][0]["state"]["terminated"]
    said = json.loads(end["message"])
    old = said[stage.value].get(field)
    said[stage.value][field] = old | value if isinstance(value, dict) else value
    end["message"] = json.dumps(said)
    await cluster.settle()
    await cluster.turn(60)
    check_status(cluster)
    assert cluster.status.phase is not Phase.FAILED
