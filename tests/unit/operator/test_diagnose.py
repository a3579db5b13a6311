"""The words of kubelet, scheduler and trainer become a reason and a remedy."""

from typing import Any

import pytest
from finetune_api.constants import Reason, Stage
from finetune_api.progress import Outcome, Result
from finetune_operator.diagnose import pod_failure, stage_failure, waiting_trouble
from finetune_operator.observed import INDEX_ANNOTATION, INDEX_FAILURES_ANNOTATION
from hypothesis import given
from hypothesis import strategies as st

Pod = dict[str, Any]


def ended(code: int, reason: str = "Error", message: str = "", index: int = 0, **status: Any) -> Pod:
    end = {"exitCode": code, "reason": reason, "message": message}
    return {
        "metadata": {"name": f"demo-train-{index}", "annotations": {INDEX_ANNOTATION: str(index)}},
        "spec": {"containers": [{"name": "trainer", "resources": {"limits": {"memory": "512Mi"}}}]},
        "status": {"phase": "Failed", "containerStatuses": [{"state": {"terminated": end}}], **status},
    }


def job(reason: str = "BackoffLimitExceeded", failed: int = 1, nodes: int = 1) -> Pod:
    condition = {"type": "Failed", "status": "True", "reason": reason, "message": "the Job's words"}
    spec = {"activeDeadlineSeconds": 60, "parallelism": nodes}
    return {"spec": spec, "status": {"failed": failed, "conditions": [condition]}}


SAID = Result(stage=Stage.TRAIN, outcome=Outcome.FAILED, reason=Reason.NON_FINITE_LOSS, message="loss is nan at step 7")


@pytest.mark.parametrize(
    ("pod", "reason", "words"),
    [
        (ended(64, message=SAID.to_termination_message()), Reason.NON_FINITE_LOSS, "loss is nan at step 7"),
        (ended(137, "OOMKilled"), Reason.OOM_KILLED, "512Mi"),
        (ended(137, "OOMKilled", SAID.to_termination_message()), Reason.OOM_KILLED, "resources.limits.memory"),
        (ended(137), Reason.STAGE_FAILED, "SIGKILL"),
        (ended(3), Reason.STAGE_FAILED, "exit code 3"),
        (ended(3, message="not json"), Reason.STAGE_FAILED, "exit code 3"),
        ({"spec": {}, "status": {"reason": "Evicted", "message": "low on disk"}}, Reason.EVICTED, "low on disk"),
        ({"spec": {}, "status": {"message": "node was lost"}}, Reason.STAGE_FAILED, "node was lost"),
        (
            ended(143, conditions=[{"type": "DisruptionTarget", "status": "True", "message": "preempted by x"}]),
            Reason.DISRUPTED,
            "preempted by x",
        ),
    ],
)
def test_a_failed_pod_has_a_cause(pod: Pod, reason: Reason, words: str) -> None:
    trouble = pod_failure(pod, Stage.TRAIN)
    assert trouble.reason is reason
    assert words in trouble.message


def test_the_last_attempt_decides_and_the_number_of_attempts_is_told() -> None:
    failure = stage_failure(job(failed=3), [ended(1), ended(137, "OOMKilled")], Stage.PREPARE)
    assert failure.reason is Reason.OOM_KILLED
    assert failure.exit_code == 137
    assert "resources.prepare.limits.memory" in failure.message
    assert failure.message.endswith("(after 3 attempts)")


VICTIM = Result(stage=Stage.TRAIN, outcome=Outcome.INTERRUPTED, reason=Reason.INTERRUPTED, message="a peer was lost")
PREEMPTED = [{"type": "DisruptionTarget", "status": "True", "message": "preempted by x"}]


@pytest.mark.parametrize(
    ("pods", "reason"),
    [
        ([ended(75, message=VICTIM.to_json()), ended(64, message=SAID.to_json(), index=1)], Reason.NON_FINITE_LOSS),
        ([ended(137, "OOMKilled"), ended(64, message=SAID.to_json(), index=1)], Reason.NON_FINITE_LOSS),
        ([ended(1), ended(137, "OOMKilled", index=1), ended(75, index=2)], Reason.OOM_KILLED),
        ([ended(75, message=VICTIM.to_json()), ended(3, index=1)], Reason.STAGE_FAILED),
        ([ended(143, conditions=PREEMPTED), ended(3, index=1)], Reason.STAGE_FAILED),
        ([ended(75, message=VICTIM.to_json()), ended(143, index=1, conditions=PREEMPTED)], Reason.DISRUPTED),
        ([ended(75, message=VICTIM.to_json()), ended(75, message=VICTIM.to_json(), index=1)], Reason.INTERRUPTED),
        ([ended(0, message=SAID.to_json(), phase="Succeeded"), ended(3, index=1)], Reason.STAGE_FAILED),
        ([ended(137, "OOMKilled"), ended(75), ended(3, index=1)], Reason.STAGE_FAILED),
    ],
)
def test_of_several_nodes_the_one_that_failed_is_named_and_not_its_victims(pods: list[Pod], reason: Reason) -> None:
    assert stage_failure(job(nodes=len(pods)), pods, Stage.TRAIN).reason is reason


def test_nodes_that_fail_together_have_failed_once() -> None:
    pods = [ended(1, index=index) for _ in range(2) for index in range(4)]
    for pod in pods[4:]:
        pod["metadata"]["annotations"][INDEX_FAILURES_ANNOTATION] = "1"
    assert stage_failure(job(failed=8, nodes=4), pods, Stage.TRAIN).message.endswith("(after 2 attempts)")


def test_a_job_without_pods_still_says_something() -> None:
    assert stage_failure(job(), [], Stage.TRAIN).message == "the Job's words"
    deadline = stage_failure(job("DeadlineExceeded"), [ended(143)], Stage.TRAIN)
    assert deadline.reason is Reason.DEADLINE_EXCEEDED
    assert "60 s" in deadline.message


def test_a_pod_that_is_only_starting_is_no_trouble() -> None:
    creating = {"status": {"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}}
    assert waiting_trouble(creating) is None
    assert waiting_trouble({}) is None
    assert waiting_trouble(creating, [{"reason": "Pulling", "message": "x"}]) is None


@given(st.integers(0, 255), st.text(max_size=50), st.text(max_size=4096))
def test_any_end_is_told(code: int, reason: str, message: str) -> None:
    failure = stage_failure(job(), [ended(code, reason, message)], Stage.TRAIN)
    assert failure.message
    assert len(failure.message) <= 2048
