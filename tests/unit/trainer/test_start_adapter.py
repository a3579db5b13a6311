"""Going on from the adapter of an earlier job: what it published is fetched, judged and trained further."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.constants import Reason, Stage
from finetune_api.plan import Location, Plan
from finetune_trainer.errors import Interrupted, UserError
from finetune_trainer.fetch_adapter import fetch_adapter
from finetune_trainer.model.load import build_model, check_start_adapter, trainable_state
from finetune_trainer.prepare import run as prepare
from finetune_trainer.publish.run import run as publish
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.telemetry.watch import Watch
from finetune_trainer.train.run import run as train
from finetune_trainer.workspace import Workspace
from safetensors.torch import load_file, save_file

from tests.models import save_tiny_gpt2
from tests.plans import make_plan
from tests.unit.trainer.trained_workspace import make_trained
from tests.unit.trainer.training_workspace import GENERATION, LABELS, make_training

COMMIT = "a" * 40
"""Of the foundation model that the earlier job had; see `trained_workspace`."""


def earlier(folder: Path, **changes: Any) -> tuple[Path, torch.nn.Module]:
    """What an earlier job published, and its trained model."""
    plan, model = make_trained(folder, **changes)
    publish(plan, Telemetry(Stage.PUBLISH, plan.job, 0))
    return folder / "artifacts", model


def location(folder: Path) -> dict[str, str]:
    return {"uri": f"file://{folder.name}", "path": str(folder)}


def fetch(adapter: Path, workspace: Workspace, plan: Plan) -> None:
    watch = Watch(Telemetry(Stage.PREPARE, plan.job, 0), "Fetching the adapter", 0, 1)
    fetch_adapter(Location.model_validate(location(adapter)), workspace, watch)


def later(folder: Path, adapter: Path, **changes: Any) -> Plan:
    """A job that goes on from `adapter`, as far as prepare takes it."""
    plan = make_training(folder, **{"model": {"adapter": {"uri": f"file://{adapter.name}"}}} | changes)
    fetch(adapter, Workspace(folder), plan)
    return plan


def labels(plan: Plan) -> list[str] | None:
    return LABELS if plan.task == "Classification" else None


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return earlier(tmp_path_factory.mktemp("earlier"))[0]


@pytest.fixture
def adapter(classifier: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(classifier, tmp_path / "adapter-of-before"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("variant", ["LoRA", "RsLoRA", "DoRA"])
@pytest.mark.parametrize("task", [{}, GENERATION], ids=["classification", "generation"])
def test_the_model_begins_as_the_earlier_job_left_it(tmp_path: Path, task: dict[str, Any], variant: str) -> None:
    changes = {"lora": {"variant": variant}, **task}
    adapter, model = earlier(tmp_path / "earlier", **changes)
    plan = later(tmp_path / "later", adapter, **changes)
    check_start_adapter(plan, Workspace(tmp_path / "later"), labels(plan), COMMIT)
    begun, left = (
        trainable_state(build_model(plan, Workspace(tmp_path / "later"), labels(plan))),
        trainable_state(model),
    )
    assert begun.keys() == left.keys()
    assert all(torch.equal(begun[name], left[name]) for name in left)


def test_a_model_with_transposed_layers_too(tmp_path: Path) -> None:
    for folder in ("earlier", "later"):
        save_tiny_gpt2(tmp_path / folder / "model")
    adapter, model = earlier(tmp_path / "earlier", **GENERATION)
    plan = later(tmp_path / "later", adapter, **GENERATION)
    check_start_adapter(plan, Workspace(tmp_path / "later"), None, COMMIT)
    begun = trainable_state(build_model(plan, Workspace(tmp_path / "later"), None))
    assert all(torch.equal(begun[name], weight) for name, weight in trainable_state(model).items())


def test_training_goes_on_and_publishes_an_adapter_again(tmp_path: Path) -> None:
    adapter, _ = earlier(tmp_path / "earlier", **GENERATION)
    plan = later(tmp_path / "later", adapter, **GENERATION)
    fresh = make_training(tmp_path / "fresh", **GENERATION)
    result, of_fresh = (train(job, Telemetry(Stage.TRAIN, job.job, 0)) for job in (plan, fresh))
    assert (result.train.baseline, of_fresh.train.baseline) == ("start adapter", "untuned model")
    assert result.train.scores[0].baseline != of_fresh.train.scores[0].baseline
    workspace = Workspace(tmp_path / "later")
    for name in ("data.json",):
        shutil.copy(tmp_path / "earlier" / "report" / name, workspace.report / name)
    publish(plan.model_copy(update={"stage": Stage.PUBLISH}), Telemetry(Stage.PUBLISH, plan.job, 0))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, workspace.artifacts))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    adapter, _ = earlier(tmp_path / "earlier")
    whole, stopped = (later(tmp_path / name, adapter) for name in ("whole", "stopped"))
    train(whole, Telemetry(Stage.TRAIN, whole.job, 0))
    telemetry = Telemetry(Stage.TRAIN, stopped.job, 0)
    beats, beat = 0, telemetry.beat

    def stop() -> None:
        nonlocal beats
        beats += 1
        if beats == 5:
            telemetry.stop_requested.set()
        beat()

    telemetry.beat = stop
    with pytest.raises(Interrupted):
        train(stopped, telemetry)
    train(stopped, Telemetry(Stage.TRAIN, stopped.job, 0))
    a, b = (load_file(Path(p.workspace) / "checkpoints/step-00000012/weights.safetensors") for p in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_of_another_start_is_refused(tmp_path: Path, adapter: Path) -> None:
    fresh = make_training(tmp_path / "job")
    train(fresh, Telemetry(Stage.TRAIN, fresh.job, 0))
    plan = later(tmp_path / "job", adapter)
    with pytest.raises(UserError, match=r"model\.adapter\.uri was None and is now file://adapter-of-before"):
        train(plan, Telemetry(Stage.TRAIN, plan.job, 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"rank": 8}}, r"write method\.lora: {variant: LoRA, rank: 4, alpha: 8}$"),
        ({"lora": {"alpha": 4}}, r"write method\.lora: {variant: LoRA, rank: 4, alpha: 8}$"),
        ({"lora": {"variant": "DoRA"}}, r"write method\.lora: {variant: LoRA, rank: 4, alpha: 8}$"),
        ({"lora": {"target_modules": ["query"]}}, r"also has .*key.* method\.lora\.targetModules must be those"),
        ({"model": {"location": {"uri": "hf://owner/other"}}}, "trained for the model owner/base, and model.uri is"),
        (GENERATION, r"also has base_model\.model\.|has no base_model\.model\.|labels"),
    ],
)
def test_another_job_is_told_what_it_would_take(
    tmp_path: Path, adapter: Path, changes: dict[str, Any], words: str
) -> None:
    model = {"adapter": {"uri": "file://a"}, **changes.get("model", {})}
    plan = later(tmp_path / "job", adapter, **changes | {"model": model})
    with pytest.raises(UserError, match=words) as caught:
        check_start_adapter(plan, Workspace(tmp_path / "job"), labels(plan), COMMIT)
    assert caught.value.reason is Reason.MODEL_INVALID
    assert str(caught.value).startswith("model.adapter.uri: the adapter does not fit: ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "is of type IA3"),
        ({"alpha_pattern": {"query": 64}}, "ranks or scales of their own"),
        ({"base_model_name_or_path": None}, "trained for the model of no name"),
        ({"revision": "b" * 40}, f"revision {'b' * 40} of the model, not {COMMIT}: set model.revision"),
        ({"use_rslora": True}, r"write method\.lora: {variant: RsLoRA,"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    tmp_path: Path, adapter: Path, changes: dict[str, Any], words: str
) -> None:
    edit(adapter / "adapter_config.json", **changes)
    plan = later(tmp_path / "job", adapter)
    with pytest.raises(UserError, match=words):
        check_start_adapter(plan, Workspace(tmp_path / "job"), LABELS, COMMIT)


def test_labels_in_another_order_are_other_labels(tmp_path: Path, adapter: Path) -> None:
    plan = later(tmp_path / "job", adapter)
    with pytest.raises(UserError, match=r"labels negative, neutral, positive; set dataset\.labels to these"):
        check_start_adapter(plan, Workspace(tmp_path / "job"), LABELS[::-1], COMMIT)


def test_a_head_for_more_labels_is_of_another_shape(tmp_path: Path, adapter: Path) -> None:
    shutil.rmtree(adapter / "base_config")
    plan = later(tmp_path / "job", adapter)
    with pytest.raises(UserError, match=r"shapes of its .*classifier.* are not those of the model and its labels"):
        check_start_adapter(plan, Workspace(tmp_path / "job"), [*LABELS, "mixed"], COMMIT)


def test_a_copy_of_the_model_elsewhere_is_the_same_model(tmp_path: Path, adapter: Path) -> None:
    model = {"adapter": {"uri": "file://a"}, "location": {"uri": "pvc://models/mirror/base/"}}
    plan = later(tmp_path / "job", adapter, model=model)
    check_start_adapter(plan, Workspace(tmp_path / "job"), LABELS, None)


@pytest.mark.parametrize("damage", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_named(tmp_path: Path, adapter: Path, damage: str) -> None:
    (adapter / damage).write_bytes(b"broken")
    plan = later(tmp_path / "job", adapter)
    with pytest.raises(UserError, match=f"its {damage} is damaged"):
        check_start_adapter(plan, Workspace(tmp_path / "job"), LABELS, COMMIT)


def test_what_is_no_adapter_is_not_fetched(tmp_path: Path, adapter: Path, classifier: Path) -> None:
    plan, workspace = make_plan(tmp_path), Workspace(tmp_path / "job")
    with pytest.raises(UserError, match=r"a whole model, not a PEFT adapter: give it as model\.uri"):
        fetch(classifier.parent / "model", workspace, plan)
    with pytest.raises(UserError, match=r"model\.adapter\.uri: file://nowhere does not exist") as caught:
        fetch(tmp_path / "nowhere", workspace, plan)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"the adapter has no adapter_model\.safetensors"):
        fetch(adapter, workspace, plan)
    assert not workspace.adapter.exists()


def test_prepare_fetches_and_judges_it_before_a_gpu_waits(tmp_path: Path, adapter: Path, classifier: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"text {n}", "label": LABELS[n % 3]}) + "\n" for n in range(90)))
    base = Path(shutil.copytree(classifier.parent / "model", tmp_path / "base"))
    plan = make_plan(
        tmp_path / "job",
        Stage.PREPARE,
        model={"location": location(base), "adapter": location(adapter)},
        dataset={"sources": [{"location": location(rows), "field": "dataset.sources[0]"}], "labels": LABELS},
    )
    prepare(plan, Telemetry(Stage.PREPARE, plan.job, 0))
    assert {path.name for path in (tmp_path / "job" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base_config",
    }  # fmt: skip
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: weight.clone() for name, weight in list(weights.items())[1:]}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=r"model\.adapter\.uri: the adapter does not fit: it has no base_model"):
        prepare(plan, Telemetry(Stage.PREPARE, plan.job, 0))
