"""Method Head: the encoder runs once over every row, and the head learns the same from what it said."""

from pathlib import Path

import pytest
import torch
from finetune_api.constants import Stage
from finetune_api.plan import Plan
from finetune_trainer.errors import Interrupted
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import run as run_module
from finetune_trainer.train.features import PROBE_LENGTHS
from finetune_trainer.train.run import run
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.models import save_tiny_bert, save_tiny_llama
from tests.unit.trainer.training_workspace import CLASSIFICATION_ROWS, make_training


def train(plan: Plan) -> dict[str, torch.Tensor]:
    with Telemetry(Stage.TRAIN, plan.job, 0) as telemetry:
        run(plan, telemetry)
    return load_file(sorted(Path(plan.workspace).glob("checkpoints/step-*"))[-1] / "weights.safetensors")


def head_job(folder: Path, save) -> Plan:
    """For the last token of a decoder the head is a layer beside it, for the first of an encoder also its pooler."""
    save(folder / "model")
    training = {"epochs": 3.0, "learning_rate": 1e-2, "evaluation_steps": 4}
    return make_training(folder, method="Head", training=training)


@pytest.mark.parametrize("save", [save_tiny_bert, save_tiny_llama])
def test_the_head_learns_the_same_and_the_encoder_runs_once(tmp_path: Path, save, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "find_encoder", lambda *_: None)
        patch.setattr(torch.nn.Dropout, "forward", lambda _, hidden: hidden)  # drawn per micro-batch, and these differ
        expected = train(head_job(tmp_path / "whole", save))
    plan = head_job(tmp_path / "features", save)
    seen: list[int] = []
    embed = torch.nn.Embedding.forward

    def count(layer, ids):
        if layer.padding_idx is not None:  # that of the tokens
            seen.append(len(ids))
        return embed(layer, ids)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Dropout, "forward", lambda _, hidden: hidden)
        patch.setattr(torch.nn.Embedding, "forward", count)
        telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
        result = run(plan, telemetry)
    found = load_file(sorted((tmp_path / "features").glob("checkpoints/step-*"))[-1] / "weights.safetensors")
    probe = 2 * len(PROBE_LENGTHS)
    assert sum(seen) == sum(CLASSIFICATION_ROWS.values()) + probe
    assert result.train.batching == telemetry.progress.batching == "encoded once"
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
    assert not [path for path in (tmp_path / "features").iterdir() if path.is_file()], "no scratch file is left"


def test_a_head_that_reads_every_token_runs_behind_the_encoder(tmp_path: Path, monkeypatch) -> None:
    """Its place is neither the first token nor the last: here, their mean."""
    original = AutoModelForSequenceClassification.from_pretrained

    def with_mean(*arguments, **named):
        model, info = original(*arguments, **named)
        pooler = model.bert.pooler
        pooler.forward = lambda hidden: pooler.activation(pooler.dense(hidden.mean(1)))
        return model, info

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", with_mean)
    plan = head_job(tmp_path, save_tiny_bert)
    assert run(plan, Telemetry(Stage.TRAIN, plan.job, 0)).train.batching == "padded"


def test_a_stop_while_it_encodes_is_answered(tmp_path: Path) -> None:
    plan = head_job(tmp_path, save_tiny_bert)
    telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
    telemetry.stop_requested.set()
    with pytest.raises(Interrupted, match="stopped while: Encoding the rows"):
        run(plan, telemetry)
