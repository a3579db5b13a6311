"""This machine as a cluster: a Job's pod is a process, with the ends and the words that Kubernetes would report."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_api.constants import STAGE_LABEL, Stage
from finetune_operator import local_job, run_folder
from finetune_operator.cluster import Event
from finetune_operator.local import LocalCluster
from finetune_operator.observed import Observed, condition_of, result_of, suspension, terminated
from finetune_operator.run_folder import RunError, RunFolder

from tests import fake_trainer
from tests.local_world import World
from tests.processes import wait_until

TRAIN = Stage.TRAIN


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
        observed = (await cluster.observe(cluster.key))[1]
        assert observed.jobs == {}
        assert list(observed.policies) == ["x"], "nobody needs to make it again"


async def test_an_event_is_passed_on_once(world):
    async with world.cluster() as cluster:
        resource, _ = await cluster.observe(cluster.key)
        for _ in range(3):
            cluster.emit(resource, Event("Normal", "Training", "train runs", "1"))
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
