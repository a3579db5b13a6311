"""The training loop: batches, loss, schedule, checkpoints."""
