"""The common judge: mean loss per supervised held-out token, `held_out.py WORKSPACE RESULT.json NAME=ADAPTER ...`.

Every adapter is put on the same fp32 model and sees the rows one by one, without padding or packing.
"""

import json
import sys
from pathlib import Path

import torch
from finetune_trainer.data.store import Rows, open_split
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

UNTUNED = "untuned"


def main(workspace: Path, result: Path, adapters: dict[str, Path]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = open_split(workspace / "data", "validation")
    losses = {}
    for name, adapter in {UNTUNED: None, **adapters}.items():
        model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        losses[name] = held_out_loss(model.eval().to(device), rows, device)
    result.write_text(json.dumps(losses), encoding="utf-8")


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, rows: Rows, device: str) -> float:
    total, targets = 0.0, 0
    for row in range(len(rows)):
        ids = torch.from_numpy(rows.input_ids(row)).to(device)
        supervised = torch.from_numpy(rows.loss_mask(row)).to(device)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1][supervised]
        total += float(cross_entropy(logits, ids[1:][supervised], reduction="sum"))
        targets += int(supervised.sum())
    return total / targets


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), {n: Path(p) for n, p in (a.split("=", 1) for a in sys.argv[3:])})
