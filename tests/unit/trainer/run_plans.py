"""`python -m tests.unit.trainer.run_plans LOGITS_BYTES PLAN...` trains by one plan after the other, as one of several processes.

RANK and the like are in the environment as torchrun sets them; MASTER_PORTS has a port for each plan. By a plan whose
name has SHORT in it the second process runs out of memory where a pass has more than MOST_TOKENS tokens.
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import forward
from finetune_trainer.train.micro_batches import MicroBatch
from finetune_trainer.train.run import run

SHORT, MOST_TOKENS = "short", 40
losses = forward.Forward.losses


def losses_in_little_memory(self: forward.Forward, batch: MicroBatch) -> torch.Tensor:
    if torch.is_grad_enabled() and batch.input_ids.numel() > MOST_TOKENS:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return losses(self, batch)


forward.LOGITS_BYTES = int(sys.argv[1])
for path, port in zip(sys.argv[2:], os.environ["MASTER_PORTS"].split(), strict=True):
    os.environ["MASTER_PORT"] = port
    plan = Plan.model_validate_json(Path(path).read_bytes())
    is_short = SHORT in Path(path).name and os.environ["RANK"] == "1"
    with patch.object(forward.Forward, "losses", losses_in_little_memory if is_short else losses):
        result = run(plan, Telemetry(Stage.TRAIN, plan.job, None))
    if SHORT in Path(path).name and result.train is not None:  # the first process tells the result
        assert result.train.micro_batch_tokens != plan.training.micro_batch_tokens
