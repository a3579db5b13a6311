"""This machine as a cluster: a Job's pod is a process, with the ends and the words that Kubernetes would report."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from finetune_api.constants import JOB_LABEL, STAGE_LABEL, Stage
from finetune_api.kubernetes import LocalReference
from finetune_api.rules import parse_job, parse_spec
from finetune_operator import local_job, run_folder
from finetune_operator.cluster import Event
from finetune_operator.local import LocalCluster, LocalLayout
from finetune_operator.local_job import LocalJob
from finetune_operator.observed import Manifest, Observed, Resource, condition_of, result_of, suspension, terminated
from finetune_operator.run_folder import RunError, RunFolder, admit

from tests import fake_trainer, specs
from tests.processes import wait_until

TRAIN = Stage.TRAIN


def manifest(**changes: object) -> Manifest:
    return specs.manifest(specs.CLASSIFICATION, changes, name="demo")


def job_manifest(run: Path, **spec: object) -> Manifest:
    """A child Job for train, as `render` makes it."""
    template = {
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "trainer", "args": ["train", "--plan", str(run / "plans" / "train.json")]}],
    }
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [64]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    labels = {JOB_LABEL: "demo", STAGE_LABEL: "train"}
    return {
        "kind": "Job",
        "metadata": {"name": "demo-train", "labels": labels},
        "spec": {
            "backoffLimit": 2,
            "podFailurePolicy": {"rules": rules},
            "template": {"metadata": {"labels": labels}, "spec": template},
            **spec,
        },
    }


def config_map(run: Path) -> Manifest:
    plan = {"workspace": str(run / "workspace")}
    metadata = {"name": "demo-train", "labels": {STAGE_LABEL: "train"}}
    return {"kind": "ConfigMap", "metadata": metadata, "data": {"plan.json": json.dumps(plan)}}


class World:
    """A run folder with a cluster in it."""

    def __init__(self, folder: Path) -> None:
        self.run = RunFolder(folder / "run")
        self.layout = LocalLayout(self.run.path, folder)
        self.events: list[Event] = []

    @asynccontextmanager
    async def cluster(self, job: Manifest | None = None) -> AsyncIterator[LocalCluster]:
        with self.run.locked() as lock:
            document = admit(self.run, parse_job(manifest()), time.time())
            async with LocalCluster(self.run, document, self.layout, self.events.append, lock) as cluster:
                if job is not None:
                    await cluster.create(Resource.read(document), config_map(self.run.path))
                    await cluster.create(Resource.read(document), job)
                yield cluster

    def job(self, **spec: object) -> Manifest:
        return job_manifest(self.run.path, **spec)

    def local_job(self, **spec: object) -> LocalJob:
        """The Job alone, with its plan; the test is its clock."""
        plan = config_map(self.run.path)["data"]["plan.json"]
        self.run.write("plans/train.json", plan)
        return LocalJob.new(self.job(**spec), 0.0, self.run.path / "logs", ())

    async def working(self) -> int:
        """Waits until the process is at work, and gives its pid."""
        workspace = self.run.path / "workspace"
        async with asyncio.timeout(30):
            while not (workspace / "working").exists():  # noqa: ASYNC110  (another process makes it)
                await asyncio.sleep(0.02)
        return int((workspace / "pid").read_text())

    def tries(self) -> int:
        return int((self.run.path / "workspace" / "tries-train").read_text())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(local_job, "FIRST_BACK_OFF", 0.05)
    return World(tmp_path)


async def observe_until(cluster: LocalCluster, holds: Callable[[Observed], object], seconds: float = 20) -> Observed:
    async with asyncio.timeout(seconds):
        while True:
            found = await cluster.observe(cluster.key)
            assert found is not None
            if holds(found[1]):
                return found[1]
            await asyncio.sleep(0.02)


def ended(observed: Observed) -> bool:
    job = observed.jobs[TRAIN]
    return condition_of(job, "Complete") is not None or condition_of(job, "Failed") is not None


def failed_for(observed: Observed) -> str:
    condition = condition_of(observed.jobs[TRAIN], "Failed")
    assert condition is not None
    return str(condition["reason"])


def codes(observed: Observed) -> list[int]:
    return [end["exitCode"] for pod in observed.pods[TRAIN] if (end := terminated(pod))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_process_that_succeeds_completes_its_job(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch)
    async with world.cluster(world.job()) as cluster:
        observed = await observe_until(cluster, ended)
        job, (pod,) = observed.jobs[TRAIN], observed.pods[TRAIN]
        assert condition_of(job, "Complete")
        assert (job["status"]["succeeded"], job["status"]["failed"]) == (1, 0)
        assert pod["status"]["phase"] == "Succeeded"
        assert result_of(pod).train.scores[0].value == "0.91"
        assert cluster.log(TRAIN).exists()


async def test_the_processes_of_several_gpus_meet_on_this_machine(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch)
    async with world.cluster(world.job(resources={"gpus": 2})) as cluster:
        await observe_until(cluster, ended)
        found = json.loads((world.run.path / "workspace" / "environment.json").read_text())
        assert (found["FINETUNE_NODE_RANK"], found["FINETUNE_MASTER_ADDR"]) == ("0", "127.0.0.1")
        assert 0 < int(found["FINETUNE_MASTER_PORT"]) != int(found["FINETUNE_TELEMETRY_PORT"])


async def test_a_users_error_is_not_tried_again(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch, train=["refuse"])
    async with world.cluster(world.job()) as cluster:
        observed = await observe_until(cluster, ended)
        assert failed_for(observed) == "PodFailurePolicy"
        assert codes(observed) == [64]
        assert result_of(observed.pods[TRAIN][0]).message == "train.jsonl line 3: no label"


async def test_a_crash_is_tried_again_up_to_the_backoff_limit(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch, train=["crash"])
    async with world.cluster(world.job()) as cluster:
        observed = await observe_until(cluster, ended)
        assert failed_for(observed) == "BackoffLimitExceeded"
        assert codes(observed) == [1, 1, 1]
        assert observed.jobs[TRAIN]["status"]["failed"] == world.tries() == 3


async def test_the_pause_before_a_new_attempt_grows(world, tmp_path, monkeypatch):
    monkeypatch.setattr(local_job, "FIRST_BACK_OFF", 1.0)
    fake_trainer.install(tmp_path, monkeypatch, train=["crash"])
    job, now = world.local_job(backoffLimit=9), 1_800_000_000.0
    for pause in (1, 2, 4):
        await job.advance(now)
        assert job.port is not None
        while job.port is not None:
            await asyncio.sleep(0.02)
            await job.advance(now)
        await job.advance(now + pause * 0.9)
        assert job.port is None
        now += pause
    assert local_job.back_off(1000) == local_job.LONGEST_BACK_OFF


async def test_a_signal_is_reported_as_the_kernel_does(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch, train=["killed", "succeed"])
    async with world.cluster(world.job()) as cluster:
        observed = await observe_until(cluster, ended)
        assert condition_of(observed.jobs[TRAIN], "Complete")
        assert codes(observed) == [137, 0]


@pytest.mark.parametrize(("action", "code"), [("work", 75), ("stubborn", 137)])
async def test_a_job_does_not_outrun_its_deadline(world, tmp_path, monkeypatch, action, code):
    fake_trainer.install(tmp_path, monkeypatch, train=[action])
    job, now = world.local_job(activeDeadlineSeconds=60), 1_800_000_000.0
    await job.advance(now)
    pid = await world.working()
    await job.advance(now + 59)
    assert is_alive(pid)
    await job.advance(now + 60)
    assert condition_of(job.manifest, "Failed")["reason"] == "DeadlineExceeded"
    assert terminated(job.pods[0])["exitCode"] == code
    assert not is_alive(pid)


async def test_progress_comes_from_the_running_process(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch, train=["work"])
    async with world.cluster(world.job()) as cluster:
        observed = await observe_until(cluster, lambda observed: observed.progress)
        assert (observed.progress.stage, observed.progress.step) == (TRAIN, 20)
        assert observed.pods[TRAIN][0]["status"]["phase"] == "Running"


async def test_a_suspended_job_has_no_pod_until_it_goes_on(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch, train=["work", "succeed"])
    async with world.cluster(world.job()) as cluster:
        await observe_until(cluster, lambda observed: observed.progress)
        resource, _ = await cluster.observe(cluster.key)
        await cluster.change_job(resource, TRAIN, suspension(True))
        observed = await observe_until(cluster, lambda _: True)
        assert observed.pods[TRAIN] == ()
        assert observed.jobs[TRAIN]["spec"]["suspend"] is True
        await cluster.change_job(resource, TRAIN, suspension(False))
        observed = await observe_until(cluster, ended)
        assert codes(observed) == [0]


async def test_a_stopped_run_goes_on_without_a_counted_failure(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch, train=["work", "succeed"])
    async with world.cluster(world.job(backoffLimit=0)) as cluster:
        await observe_until(cluster, lambda observed: observed.progress)
        uid = cluster.document["metadata"]["uid"]
    async with world.cluster() as cluster:
        assert cluster.document["metadata"]["uid"] == uid
        observed = await observe_until(cluster, ended)
        assert codes(observed) == [75, 0]
        assert condition_of(observed.jobs[TRAIN], "Complete")


async def test_a_deleted_job_leaves_no_process(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch, train=["work"])
    async with world.cluster(world.job()) as cluster:
        await observe_until(cluster, lambda observed: observed.progress)
        pid = await world.working()
        resource, _ = await cluster.observe(cluster.key)
        await cluster.delete_child(resource, TRAIN)
        assert not is_alive(pid)
        assert TRAIN not in (await cluster.observe(cluster.key))[1].jobs


async def test_kill_does_not_wait_for_a_stubborn_process(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch, train=["stubborn"])
    job = world.job()
    job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 600
    async with world.cluster(job) as cluster:
        await observe_until(cluster, lambda observed: observed.progress)
        pid = await world.working()
        stopping = asyncio.create_task(cluster.stop())
        await asyncio.sleep(0.1)
        assert is_alive(pid)
        cluster.kill()
        await asyncio.wait_for(stopping, 5)
        assert not is_alive(pid)


async def test_a_queued_job_starts_at_once(world, tmp_path, monkeypatch):
    """On this machine there is no Kueue that would let it go."""
    fake_trainer.install(tmp_path, monkeypatch)
    async with world.cluster(world.job(suspend=True)) as cluster:
        assert condition_of((await observe_until(cluster, ended)).jobs[TRAIN], "Complete")


async def test_volumes_and_policies_make_nothing(world):
    async with world.cluster() as cluster:
        resource, _ = await cluster.observe(cluster.key)
        for kind in ("PersistentVolumeClaim", "NetworkPolicy"):
            await cluster.create(resource, {"kind": kind, "metadata": {"name": "x", "labels": {STAGE_LABEL: "train"}}})
        assert (await cluster.observe(cluster.key))[1].jobs == {}


async def test_an_event_is_passed_on_once(world):
    async with world.cluster() as cluster:
        resource, _ = await cluster.observe(cluster.key)
        for _ in range(3):
            await cluster.emit(resource, Event("Normal", "Training", "train runs", "1"))
        assert len(world.events) == 1


PARENT = """
import asyncio, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.operator.test_local import World, observe_until

async def main():
    world = World(Path(sys.argv[1]))
    async with world.cluster(world.job()) as cluster:
        await observe_until(cluster, lambda _: False, 60)

asyncio.run(main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl(2)")
def test_no_process_outlives_a_killed_run(world, tmp_path, monkeypatch):
    fake_trainer.install(tmp_path, monkeypatch, train=["stubborn", "succeed"])
    script = PARENT.format(root=str(Path(__file__).parents[3]))
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    try:
        wait_until((world.run.path / "workspace" / "working").exists, parent, seconds=20)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    pid = int((world.run.path / "workspace" / "pid").read_text())
    wait_until(lambda: not is_alive(pid), seconds=5)

    async def go_on() -> Observed:
        async with world.cluster() as cluster:
            return await observe_until(cluster, ended)

    assert codes(asyncio.run(go_on())) == [137, 0]  # and the kill of another is no failure of the stage


def test_a_run_has_one_master(world, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.1)
    with world.run.locked(), pytest.raises(RunError, match="another `finetune run` is at work"), world.run.locked():
        pass
    with world.run.locked():
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/run"), RunFolder(tmp_path / "file" / "run").locked():
        pass


class TestAdmission:
    def admit(self, world: World, fresh: bool = False, **changes: object) -> Manifest:
        return admit(world.run, parse_job(manifest(**changes)), time.time(), fresh)

    def write(self, world: World, status: Manifest) -> None:
        document = world.run.read("job.json")
        assert document is not None
        world.run.write("job.json", {**document, "status": status})

    def failed(self, code: int | None, stage: str | None = "train") -> Manifest:
        """The status of a failed job whose data were prepared."""
        failure = {"reason": "StageFailed", "message": "it broke", "stage": stage, "exitCode": code}
        return {
            "phase": "Failed",
            "message": "it broke",
            "data": fake_trainer.success(Stage.PREPARE).prepare.data.to_dict(),
            "completionTime": "2026-01-01T00:00:00Z",
            "failure": {key: value for key, value in failure.items() if value is not None},
        }

    def test_a_new_run_gets_what_an_api_server_gives(self, world):
        metadata = self.admit(world)["metadata"]
        assert (metadata["name"], metadata["namespace"], metadata["generation"]) == ("demo", "default", 1)
        assert metadata["uid"]
        assert metadata["creationTimestamp"]

    def test_the_same_spec_goes_on(self, world):
        assert self.admit(world) == self.admit(world)

    def test_limits_may_change(self, world):
        first, second = self.admit(world), self.admit(world, **{"limits.retries": 7})
        assert second["metadata"]["uid"] == first["metadata"]["uid"]
        assert second["metadata"]["generation"] == 2
        assert second["spec"]["limits"]["retries"] == 7

    def test_another_spec_is_refused_by_the_names_of_its_fields(self, world):
        self.admit(world)
        with pytest.raises(RunError, match=r"changed: training\).*--fresh"):
            self.admit(world, **{"training.epochs": 9})

    def test_fresh_discards_the_run_and_nothing_else(self, world):
        first = self.admit(world)
        (world.run.path / "workspace").mkdir()
        (world.run.path / "mine.txt").touch()
        second = self.admit(world, fresh=True, **{"training.epochs": 9})
        assert second["metadata"]["uid"] != first["metadata"]["uid"]
        assert not (world.run.path / "workspace").exists()
        assert (world.run.path / "mine.txt").exists()

    @pytest.mark.parametrize("fresh", [True, False])
    def test_what_no_run_made_is_never_removed(self, world, fresh):
        mine = world.run.path / "logs" / "mine.txt"
        mine.parent.mkdir(parents=True)
        mine.touch()
        with pytest.raises(RunError, match=r"run/logs is there and was not made by a run; .*--output"):
            self.admit(world, fresh=fresh)
        assert mine.exists()

    def test_a_failed_stage_is_tried_again_on_what_is_done(self, world):
        first = self.admit(world)
        self.write(world, self.failed(1))
        failed = {"conditions": [{"type": "Failed", "status": "True"}]}
        children = {"prepare": {"job": {"status": {}}, "pods": []}, "train": {"job": {"status": failed}, "pods": []}}
        world.run.write("children.json", children)
        again = self.admit(world)
        assert again["metadata"]["uid"] == first["metadata"]["uid"]
        assert set(again["status"]) == {"data"}
        assert set(world.run.read("children.json")) == {"prepare"}

    @pytest.mark.parametrize("failure", [{"code": 64}, {"code": None, "stage": None}])
    def test_what_the_user_had_to_mend_starts_from_nothing(self, world, failure):
        first = self.admit(world)
        self.write(world, self.failed(**failure))
        (world.run.path / "workspace").mkdir()
        again = self.admit(world)
        assert again["metadata"]["uid"] != first["metadata"]["uid"]
        assert again["status"] == {}
        assert not (world.run.path / "workspace").exists()

    def test_after_a_failure_the_spec_may_change(self, world):
        self.admit(world)
        self.write(world, self.failed(1))
        assert self.admit(world, **{"training.epochs": 9})["status"] == {}

    def test_a_damaged_folder_says_what_to_do(self, world):
        self.admit(world)
        (world.run.path / "job.json").write_text("{")
        with pytest.raises(RunError, match=r"job.json is damaged.*--fresh"):
            self.admit(world)
        assert self.admit(world, fresh=True)["status"] == {}


class TestLayout:
    def test_files_are_relative_to_the_manifest(self, tmp_path):
        layout = LocalLayout(tmp_path / "run", tmp_path / "jobs")
        assert layout.locate("file://data/a.jsonl", None).path == str(tmp_path / "jobs" / "data" / "a.jsonl")
        assert layout.locate("file://../models/m", None).path == str(tmp_path / "models" / "m")
        assert layout.locate("file:///etc/hosts", None).path == "/etc/hosts"

    def test_prepared_data_is_kept_for_the_same_run_or_for_all_on_a_claim(self, tmp_path):
        (tmp_path / "disk").mkdir()
        layout = LocalLayout(tmp_path / "run", tmp_path, volumes={"team": tmp_path / "disk"})
        assert layout.cache(parse_spec(manifest()["spec"])) == str(tmp_path / "run" / ".prepared")
        shared = parse_spec(manifest(**{"workspace.claimName": "team"})["spec"])
        assert layout.cache(shared) == str(tmp_path / "disk" / ".prepared")

    def test_a_folder_stands_for_a_claim_or_config_map(self, tmp_path):
        layout = LocalLayout(tmp_path, tmp_path, volumes={"store": tmp_path / "s", "texts": tmp_path / "t"})
        assert layout.locate("pvc://store/a/b.csv", None).path == str(tmp_path / "s" / "a" / "b.csv")
        assert layout.locate("configmap://texts/c.csv", None).path == str(tmp_path / "t" / "c.csv")

    @pytest.mark.parametrize("uri", ["pvc://store/a.csv", "configmap://store/a.csv"])
    def test_without_one_the_option_is_named(self, tmp_path, uri):
        with pytest.raises(RunError, match=f"{uri} is only in a cluster.*--volume store=FOLDER"):
            LocalLayout(tmp_path, tmp_path).locate(uri, None)

    def test_a_secret_is_a_folder_or_the_environments(self, tmp_path):
        layout = LocalLayout(tmp_path, tmp_path, secrets={"cloud": tmp_path / "keys"})
        location = layout.locate("s3://bucket/a.csv", LocalReference(name="cloud"))
        assert (location.path, location.secret_dir) == (None, str(tmp_path / "keys"))
        assert layout.locate("s3://bucket/a.csv", LocalReference(name="other")).secret_dir is None

    def test_every_place_without_one_is_found(self, tmp_path):
        changes = {
            "model.uri": "pvc://models/m",
            "model.adapter": {"uri": "pvc://models/a"},
            "dataset.sources": [{"uri": "file://a.csv"}, {"uri": "configmap://texts/a"}],
            "dataset.validation": {"sources": [{"uri": "pvc://data/v"}]},
            "dataset.test": {"sources": [{"uri": "pvc://data/t"}]},
            "dataset.review.decisions": [{"uri": "pvc://data/r"}],
            "output.uri": "pvc://out/o",
            "resources.nodes": 2,
            "workspace.claimName": "team",
        }
        spec = parse_spec(manifest(**changes)["spec"])
        found = LocalLayout(tmp_path, tmp_path).findings(spec)
        assert str(found[0]).startswith("spec.resources.nodes: found 2: `finetune run` has this machine only")
        assert [finding.field for finding in found] == [
            "spec.resources.nodes",
            "spec.model.uri",
            "spec.model.adapter.uri",
            "spec.dataset.sources[1].uri",
            "spec.dataset.validation.sources[0].uri",
            "spec.dataset.test.sources[0].uri",
            "spec.dataset.review.decisions[0].uri",
            "spec.output.uri",
        ]

    def test_a_mapped_workspace_claim_has_a_folder_per_job(self, tmp_path):
        resource = Resource.read({"metadata": {"name": "demo", "uid": "12345678-9"}, "spec": {}})
        spec = parse_spec(manifest(**{"workspace.claimName": "store"})["spec"])
        mapped = LocalLayout(tmp_path / "run", tmp_path, volumes={"store": tmp_path / "s"})
        assert mapped.workspace(resource, spec) == str(tmp_path / "s" / "demo-12345678")
        assert LocalLayout(tmp_path / "run", tmp_path).workspace(resource, spec) == str(tmp_path / "run" / "workspace")
