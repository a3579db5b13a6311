"""`python -m tests.unit.trainer.run_plans LOGITS_BYTES PLAN...` trains by one plan after the other, as one of several processes.

RANK and the like are in the environment as torchrun sets them; MASTER_PORTS has a port for each plan.
"""

import os
import sys
from pathlib import Path

from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import forward
from finetune_trainer.train.run import run

forward.LOGITS_BYTES = int(sys.argv[1])
for path, port in zip(sys.argv[2:], os.environ["MASTER_PORTS"].split(), strict=True):
    os.environ["MASTER_PORT"] = port
    plan = Plan.model_validate_json(Path(path).read_bytes())
    run(plan, Telemetry(Stage.TRAIN, plan.job, None))
