"""The process of a running pod, in virtual time, and what it leaves on the job's volume."""

import asyncio
import random
from dataclasses import dataclass, field

from finetune_api.constants import ExitCode, Reason, Stage
from finetune_api.progress import Outcome, Progress, Result

from tests.fake_cluster import success
from tests.virtual_time import Clock

STEPS, CHECKPOINT_STEPS = 60, 10
LENGTH = {Stage.PREPARE: 8, Stage.TRAIN: STEPS, Stage.PUBLISH: 4}
"""Of the stages, in steps of about a second."""


@dataclass
class Workspace:
    """What the trainers of one FineTuneJob leave on their volume."""

    job: str
    step: int = 0
    """Of the newest checkpoint."""
    writer: str | None = None
    """The pod that writes now."""
    completions: dict[Stage, int] = field(default_factory=dict)
    """How often a stage has ended well."""


@dataclass
class Trainer:
    """The process of a running pod."""

    task: asyncio.Task[None]
    progress: Progress
    asked_to_stop: bool = False

    async def work(self, stage: Stage, workspace: Workspace) -> tuple[int, Result]:
        """To the end, or until it is asked to stop: the exit code and the last word."""
        assert stage is Stage.PREPARE or workspace.completions, f"{stage} on an empty volume"
        step = resumed = workspace.step if stage is Stage.TRAIN else 0
        while step < LENGTH[stage]:
            await asyncio.sleep(random.uniform(0.5, 1.5))
            if self.asked_to_stop:
                await asyncio.sleep(random.uniform(0.1, 2.0))
                if stage is Stage.TRAIN:
                    workspace.step = step
                words = "stopped; a checkpoint was saved"
                said = Result(stage=stage, outcome=Outcome.INTERRUPTED, reason=Reason.INTERRUPTED, message=words)
                return ExitCode.TRY_AGAIN, said
            step += 1
            if stage is Stage.TRAIN and step % CHECKPOINT_STEPS == 0:
                workspace.step = step
            self.progress = Progress(
                stage=stage, activity="Working", fraction=step / LENGTH[stage], updated_at=Clock.time(),
                **({"step": step, "total_steps": STEPS, "resumed_from_step": resumed} if stage is Stage.TRAIN else {}),
            )  # fmt: skip
        workspace.completions[stage] = workspace.completions.get(stage, 0) + 1
        return ExitCode.DONE, success(stage)
