"""What a trainer process says about itself while it runs: progress, metrics and logs."""

from finetune_trainer.telemetry.telemetry import Telemetry

__all__ = ["Telemetry"]
