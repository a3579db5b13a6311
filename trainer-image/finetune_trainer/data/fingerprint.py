"""The fingerprint of prepared data: of every row, and of what made tokens of it."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from finetune_api.plan import Plan

from finetune_trainer.data.split import Split
from finetune_trainer.data.store import TokenizedRow


class Fingerprint:
    """tokenizer: the hash of its files."""

    def __init__(self, plan: Plan, labels: Sequence[str] | None, max_length: int, tokenizer: str) -> None:
        clean, personal_data = plan.dataset.clean, plan.dataset.personal_data
        changes = [clean and clean.to_dict(), personal_data and personal_data.settings.to_dict()]
        settings = [plan.task.value, changes, labels, max_length]
        self._digest = hashlib.sha256(json.dumps(settings).encode() + tokenizer.encode())

    def add(self, split: Split, row: TokenizedRow) -> None:
        for document in row.documents:
            ids = np.asarray(document.input_ids, dtype="<i4").tobytes()
            mask = document.loss_mask
            target = str(document.label).encode() if mask is None else np.packbits(mask).tobytes()
            self._digest.update(f"{split} {len(ids)} {len(target)} ".encode() + ids + target)
        if row.weight != 1:
            self._digest.update(f"weight {row.weight}".encode())

    @property
    def value(self) -> str:
        """Of the rows so far."""
        return self._digest.hexdigest()
