"""Preference tuning: the loss is that of the paper, it is learned, and an interrupted run ends in the same weights."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_api.constants import Reason, Stage
from finetune_api.plan import Plan
from finetune_api.progress import Outcome, Result
from finetune_api.report import EvaluationReport
from finetune_api.spec import Metric, Precision, Task
from finetune_trainer.data.store import Rows, open_split
from finetune_trainer.errors import Interrupted, UserError
from finetune_trainer.evaluate import metrics
from finetune_trainer.model.load import build_model, trainable_state
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import preference
from finetune_trainer.train.device import Device
from finetune_trainer.train.forward import Forward, prove
from finetune_trainer.train.loop import accumulate_gradients
from finetune_trainer.train.micro_batches import Batching
from finetune_trainer.train.preference import Preference
from finetune_trainer.train.run import run
from finetune_trainer.workspace import Workspace
from safetensors.torch import load_file

from tests.models import save_tiny_gpt2, save_tiny_llama
from tests.unit.trainer.training_workspace import PREFERENCE, make_training, untie

CPU = Device(torch.device("cpu"), Precision.FP32, "cpu")
BETA = 0.3
FULL = {"method": "Full", "lora": None}
SAVES = {"training": {"checkpoint_steps": 3, "evaluation_steps": 4, "micro_batch_tokens": 90}}
"""44 pairs, 8 per step, 2 epochs: 12 steps, checkpoints at 3 6 9 12, evaluations at 4 8 12."""


def train(plan: Plan, telemetry: Telemetry | None = None) -> Result:
    return run(plan, telemetry or Telemetry(Stage.TRAIN, plan.job, 0))


def report(plan: Plan) -> EvaluationReport:
    return EvaluationReport.model_validate_json((Path(plan.workspace) / "report" / "evaluation.json").read_bytes())


def same_weights(plan: Plan, other: Plan) -> bool:
    def weights(plan: Plan, folder: str) -> dict[str, torch.Tensor]:
        return load_file(Path(plan.workspace) / "checkpoints" / folder / "weights.safetensors")

    pairs = [(weights(plan, folder), weights(other, folder)) for folder in ("step-00000012", "best")]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def stop_when(plan: Plan, asked: Any) -> Telemetry:
    """Telemetry that asks to stop at the first update that `asked` says yes to."""
    telemetry = Telemetry(Stage.TRAIN, plan.job, 0)
    update = telemetry.update

    def watch(**fields: Any) -> None:
        update(**fields)
        if asked(fields):
            telemetry.stop_requested.set()

    telemetry.update = watch
    return telemetry


def disturb(model: torch.nn.Module) -> None:
    """As if it had been trained a while."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in trainable_state(model).values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)


def by_the_paper(model: torch.nn.Module, start: torch.nn.Module, data: Rows, pairs: list[int]) -> torch.Tensor:
    """Equation 7 on padded batches, with all logits and both models: the mean loss."""
    documents = [2 * pair + answer for pair in pairs for answer in range(2)]
    longest = max(len(data.input_ids(d)) for d in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask, answer = torch.zeros_like(ids), torch.zeros_like(ids)
    for place, d in enumerate(documents):
        length = len(data.input_ids(d))
        ids[place, :length], mask[place, :length] = torch.from_numpy(data.input_ids(d)), 1
        answer[place, :length] = torch.from_numpy(data.loss_mask(d).astype(np.int64))

    def likelihoods(model: torch.nn.Module) -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (each * answer[:, 1:]).sum(-1)

    with torch.no_grad():
        before = likelihoods(start)
    chosen, rejected = (likelihoods(model) - before).view(-1, 2).unbind(1)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def batching(packed: bool, most_tokens: int, in_buckets: bool = False) -> Batching:
    return Batching(Task.GENERATION, packed, most_tokens, pad_token_id=0, in_buckets=in_buckets)


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("method", [{"lora": {"dropout": 0.0}}, FULL], ids=["LoRA", "Full"])
@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_gpt2])
def test_loss_and_gradients_are_those_of_the_paper_however_a_step_is_cut(tmp_path: Path, save, method) -> None:
    save(tmp_path / "model")
    plan = make_training(tmp_path, **PREFERENCE | {"dpo": {"beta": BETA}}, **method)
    data = open_split(tmp_path / "data", "train", paired=True)
    start, plain, model = (build_model(plan, Workspace(tmp_path), None).eval() for _ in range(3))
    packing = prove(model, Task.GENERATION, CPU)
    assert packing.packs
    data.reference = preference.start_likelihoods(packing, data, batching(True, 500), CPU, lambda _: None)
    disturb(model)
    disturb(plain)
    expected = by_the_paper(plain, start, data, list(range(16)))
    assert abs(float(expected.detach()) - math.log(2)) > 0.01, "it must not be the loss of the start"
    expected.backward()
    gradients = trained(plain)
    size = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    for forward, in_buckets in ((packing, False), (packing, True), (Forward(plain, Task.GENERATION), False)):
        for most_tokens, fewest in ((1, 16), (70, 3), (10_000, 1)):
            forward.model.zero_grad()
            how = batching(forward.packs, most_tokens, in_buckets)
            micro = [how.read(data, group) for group in how.cut(data, np.arange(16))]
            assert len(micro) >= fewest
            sizes = [batch.tokens if forward.packs else batch.input_ids.numel() for batch in micro]
            assert all(n <= most_tokens or len(batch.rows) == 1 for n, batch in zip(sizes, micro, strict=True))
            loss = accumulate_gradients(Preference(forward, BETA), micro, CPU, [0, 0])
            assert float(loss) / 16 == pytest.approx(float(expected.detach()), rel=1e-5)
            found = trained(forward.model)
            error = math.sqrt(sum(float((found[name] - gradients[name]).square().sum()) for name in gradients))
            assert error < 1e-5 * size


OUTPUT_LORA = {"lora": {"rank": 8, "alpha": 16, "target_modules": ["lm_head", "down_proj"]}}
"""A model of random weights learns little while its output layer is fixed."""


@pytest.mark.parametrize("method", [OUTPUT_LORA, FULL], ids=["LoRA", "Full"])
def test_a_preference_is_learned_and_shows_on_held_out_pairs(tmp_path: Path, method) -> None:
    rows = {"train": 200, "validation": 40, "test": 60}
    rate = {"learning_rate": 1e-2, "epochs": 4.0, "evaluation_steps": 20}
    gate = {"metric": "rewardAccuracy", "minimum": 0.9, "minimum_gain": 0.4}
    scores = {"metrics": ["rewardAccuracy", "rewardMargin", "loss"], "gate": gate}
    plan = make_training(tmp_path, rows, **PREFERENCE | {"evaluation": scores}, training=rate, **method)
    untie(Workspace(tmp_path))
    result = train(plan)
    assert (result.outcome, result.train.baseline) == (Outcome.SUCCEEDED, "untuned model")
    found = report(plan)
    assert (found.split, found.rows) == ("test", 60)
    assert found.baseline.metrics == {"loss": pytest.approx(math.log(2)), "rewardAccuracy": 0.5, "rewardMargin": 0.0}
    assert found.tuned.metrics["rewardAccuracy"] > 0.9
    assert found.tuned.metrics["loss"] < 0.5
    assert found.tuned.metrics["rewardMargin"] > 0
    assert [score.metric for score in result.train.scores] == ["rewardAccuracy", "rewardMargin", "loss"]
    assert found.gate.passed
    assert result.train.samples_per_second > 0


def test_what_cannot_be_preferred_is_not_and_the_gate_says_so(tmp_path: Path) -> None:
    gate = {"metric": "rewardAccuracy", "minimum": 0.9}
    changes = PREFERENCE | {"evaluation": {"metrics": ["loss"], "gate": gate}}
    result = train(make_training(tmp_path, **changes, training={"learning_rate": 1e-9}))
    assert (result.outcome, result.reason) == (Outcome.FAILED, Reason.GATE_FAILED)
    assert "rewardAccuracy is 0." in result.message


def test_pairs_that_are_preferred_neither_way_count_half() -> None:
    found = metrics.preference("tuned", np.array([2.0, 0.0, -1.0, 0.0])).metrics
    assert found[Metric.REWARD_ACCURACY] == 0.5
    assert found[Metric.REWARD_MARGIN] == 0.25
    expected = (math.log1p(math.exp(-2)) + 2 * math.log(2) + math.log1p(math.e)) / 4
    assert found[Metric.LOSS] == pytest.approx(expected)
    assert math.isfinite(metrics.preference("tuned", np.array([-1e6])).metrics[Metric.LOSS])


def test_the_first_loss_is_that_of_a_model_that_prefers_nothing(tmp_path: Path) -> None:
    """Also where training goes on from an adapter: the start is then the model with it."""
    changes = {"lora": {"dropout": 0.0}, "training": {"max_steps": 1, "epochs": None}, **PREFERENCE}
    plan = make_training(tmp_path, **changes)
    model = build_model(plan, Workspace(tmp_path), None)
    disturb(model)
    model.save_pretrained(Workspace(tmp_path).adapter, save_embedding_layers=False)
    later = make_training(tmp_path, model={"adapter": {"uri": "s3://bucket/adapter"}}, **changes)
    for each, name in ((plan, "untuned model"), (later, "start adapter")):
        result = train(each)
        assert result.train.baseline == name
        assert result.train.training_loss == pytest.approx(math.log(2), abs=1e-5)
        shutil.rmtree(tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory):
    plan = make_training(tmp_path_factory.mktemp("whole"), **PREFERENCE, **SAVES)
    return plan, train(plan)


def test_a_stopped_run_asks_the_start_model_only_once(uninterrupted, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("finetune_trainer.train.reporting.REPORT_SECONDS", 0.0)
    whole, result = uninterrupted
    plan = make_training(tmp_path, **PREFERENCE, **SAVES)
    for step in (1, 5, 11):
        with pytest.raises(Interrupted):
            train(plan, stop_when(plan, lambda fields, step=step: fields.get("step") == step))
        monkeypatch.setattr(preference, "start_likelihoods", None)  # it is not the start model any more
    again = train(plan)
    assert same_weights(plan, whole)
    assert report(plan) == report(whole)
    assert again.train.scores == result.train.scores


def test_a_stop_while_the_start_model_is_asked_is_told_and_made_up_for(uninterrupted, tmp_path: Path) -> None:
    plan = make_training(tmp_path, **PREFERENCE, **SAVES)
    asked = "Scoring the validation pairs with the start model"
    with pytest.raises(Interrupted, match=asked):
        train(plan, stop_when(plan, lambda fields: fields.get("activity") == asked))
    references = sorted(path.name for path in (tmp_path / "checkpoints").glob("reference-*"))
    assert references == ["reference-train.safetensors"]
    train(plan)
    assert same_weights(plan, uninterrupted[0])


@pytest.mark.parametrize("harm", ["broken", "of another run"])
def test_a_reference_that_cannot_be_trusted_is_made_again(uninterrupted, tmp_path: Path, harm, monkeypatch) -> None:
    plan = make_training(tmp_path, **PREFERENCE, **SAVES)
    monkeypatch.setattr("finetune_trainer.train.reporting.REPORT_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        train(plan, stop_when(plan, lambda fields: fields.get("step") == 4))
    path = tmp_path / "checkpoints" / "reference-train.safetensors"
    if harm == "broken":
        path.write_bytes(path.read_bytes()[:50])
    else:
        preference.remember(path, "another", np.zeros((44, 2), np.float32))
    train(plan)
    assert same_weights(plan, uninterrupted[0])


def test_a_checkpoint_of_another_beta_or_of_no_preferences_is_refused(tmp_path: Path) -> None:
    train(make_training(tmp_path, **PREFERENCE, **SAVES))
    with pytest.raises(UserError, match=r"method\.dpo\.beta was 0\.1 and is now 0\.2"):
        train(make_training(tmp_path, **PREFERENCE | {"dpo": {"beta": 0.2}}, **SAVES))
