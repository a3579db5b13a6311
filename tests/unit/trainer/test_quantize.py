"""QLoRA: what is quantised and what is not, what training it needs, and what is said where it cannot be done.

bitsandbytes has a CPU backend, which the models here are run with; jobs are held to CUDA.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.constants import Reason, Stage
from finetune_api.spec import Precision, Task
from finetune_trainer.data.store import open_split
from finetune_trainer.errors import Interrupted, UserError
from finetune_trainer.model import load, quantize
from finetune_trainer.model.load import build_model, load_trainable_state, trainable_state
from finetune_trainer.model.quantize import Nf4, choose_quantization
from finetune_trainer.publish.run import run as publish
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.train import reporting
from finetune_trainer.train import run as stage
from finetune_trainer.train.device import cast_frozen
from finetune_trainer.train.run import run
from finetune_trainer.workspace import Workspace, write_file
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.plans import make_plan
from tests.unit.trainer.trained_workspace import data_report
from tests.unit.trainer.training_workspace import GENERATION, LABELS, make_training, stop_after

CPU = torch.device("cpu")
NF4 = {"lora": {"quantization": "NF4"}}
WIDTH = 64
"""NF4 has one scale per so many weights of a row."""


def make_wide(folder: Path, architecture: str, **changes: Any):
    """A workspace with a model that is wide enough, and its plan."""
    plan = make_training(folder, **changes)
    size = {"vocab_size": 320, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = {
        "bert": lambda: BertModel(BertConfig(**size, intermediate_size=128)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**size, intermediate_size=128, num_key_value_heads=2)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=WIDTH, n_layer=2, n_head=4)),
    }[architecture]()
    for old in (folder / "model").glob("*.safetensors"):
        old.unlink()
    model.save_pretrained(folder / "model")
    return plan


ARCHITECTURES = {"bert": {}, "llama": GENERATION, "gpt2": GENERATION}


def build(folder: Path, architecture: str, variant: str = "LoRA", compute: torch.dtype = torch.bfloat16):
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "variant": variant, "quantization": "NF4"}
    plan = make_wide(folder, architecture, lora=lora, **ARCHITECTURES[architecture])
    labels = LABELS if plan.task is Task.CLASSIFICATION else None
    return plan, labels, build_model(plan, Workspace(folder), labels, Nf4(CPU, compute))


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="installed on Linux x86_64 only")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_blocks_are_quantised_and_nothing_else(tmp_path: Path, bitsandbytes, architecture: str) -> None:
    plan, labels, model = build(tmp_path, architecture)
    cast_frozen(model, Precision.BF16)
    quantised = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    plain = build_model(plan, Workspace(tmp_path), labels)
    blocks = [module for name, module in plain.named_modules() if name.endswith(".base_layer")]
    assert len(quantised) == len(blocks) > 6
    assert all("layer" in name or ".h." in name for name in quantised)
    packed = {model.get_submodule(name).weight.dtype for name in quantised}
    assert packed == {torch.uint8}, "a cast must leave them alone"
    assert {weight.dtype for weight in trainable_state(model).values()} == {torch.float32}
    stored = sum(model.get_submodule(name).weight.numel() for name in quantised)
    assert stored * 2 == sum(module.weight.numel() for module in blocks), "two weights in a byte"


@pytest.mark.parametrize("variant", ["LoRA", "RsLoRA", "DoRA"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_trains_the_adapters_and_they_fit_the_full_weights(
    tmp_path: Path, bitsandbytes, architecture: str, variant: str
) -> None:
    """Adapters that were trained beside NF4 are published beside, or merged into, the full weights."""
    plan, labels, model = build(tmp_path, architecture, variant)
    before = {name: weight.clone() for name, weight in trainable_state(model).items()}
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    ids = torch.from_numpy(open_split(tmp_path / "data", "train").input_ids(0))[None]
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            output = model.train()(input_ids=ids, labels=torch.tensor([1]) if labels else ids)
        output.loss.backward()
        losses.append(float(output.loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    after = trainable_state(model)
    assert all(not torch.equal(before[name], after[name]) for name in after if "lora_B" in name)
    save_file({name: weight.contiguous() for name, weight in after.items()}, tmp_path / "weights.safetensors")
    full = build_model(plan, Workspace(tmp_path), labels)
    load_trainable_state(full, tmp_path / "weights.safetensors")
    with torch.no_grad():
        assert float(full.eval()(input_ids=ids, labels=torch.tensor([1]) if labels else ids).loss) < losses[0] - 0.05
        exact = full.eval()(input_ids=ids).logits
        merged = full.merge_and_unload()(input_ids=ids).logits
        assert torch.allclose(exact, merged, atol=1e-4)


@pytest.mark.parametrize("output", ["Adapter", "Merged"])
def test_a_whole_run_goes_on_exactly_and_its_result_is_published_in_full_precision(
    tmp_path: Path, bitsandbytes, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr(stage, "choose_quantization", lambda _plan, device, compute: Nf4(device, compute))
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)  # for inference alone it repacks
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 0.0)
    changes = {
        **NF4,
        **GENERATION,
        "training": {"learning_rate": 1e-2, "checkpoint_steps": 5},
        "output": {"format": output},
    }
    plans = [make_wide(tmp_path / name, "llama", **changes) for name in ("whole", "stopped")]
    result = run(plans[0], Telemetry(Stage.TRAIN, plans[0].job, 0))
    loss = result.train.scores[0]
    assert float(loss.value) < float(loss.baseline) - 0.1
    with pytest.raises(Interrupted):
        run(plans[1], stop_after(plans[1], 7))
    run(plans[1], Telemetry(Stage.TRAIN, plans[1].job, 0))
    one, other = (load_file(Path(plan.workspace) / "checkpoints/best/weights.safetensors") for plan in plans)
    assert all(torch.equal(one[name], other[name]) for name in one)
    folder = tmp_path / "whole"
    write_file(folder / "report" / "data.json", data_report().to_json())
    publish(plans[0].model_copy(update={"stage": Stage.PUBLISH}), Telemetry(Stage.PUBLISH, plans[0].job, 0))
    untuned = LlamaForCausalLM.from_pretrained(folder / "model")
    ids = torch.from_numpy(open_split(folder / "data", "validation").input_ids(0))[None]
    with torch.no_grad():
        before = float(untuned.eval()(input_ids=ids, labels=ids).loss)
    model = (
        PeftModel.from_pretrained(untuned, folder / "artifacts")
        if output == "Adapter"
        else LlamaForCausalLM.from_pretrained(folder / "artifacts")
    )
    assert not getattr(model.config, "quantization_config", None)
    with torch.no_grad():
        assert float(model.eval()(input_ids=ids, labels=ids).loss) < before - 0.05


def test_what_from_pretrained_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class AskedError(Exception):
        pass

    def from_pretrained(_folder: Path, **settings: Any) -> None:
        seen.update(settings)
        raise AskedError

    for auto in (load.AutoModelForCausalLM, load.AutoModelForSequenceClassification):
        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    cuda = torch.device("cuda", 0)
    for folder, changes, labels, kept in (
        (tmp_path / "a", GENERATION, None, {"lm_head"}),
        (tmp_path / "b", {}, LABELS, {"bert.pooler.dense", "classifier"}),
    ):
        plan = make_training(folder, **changes)
        with pytest.raises(AskedError):
            build_model(plan, Workspace(folder), labels, Nf4(cuda, torch.bfloat16))
        config = seen["quantization_config"]
        assert seen["device_map"] == {"": cuda}
        assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (
            True,
            "nf4",
            True,
        )
        assert config.bnb_4bit_compute_dtype is torch.bfloat16
        assert set(config.llm_int8_skip_modules) == kept
        seen.clear()
        with pytest.raises(AskedError):
            build_model(plan, Workspace(folder), labels)
        assert not {"quantization_config", "device_map"} & seen.keys()


def test_only_a_job_that_asks_for_it_is_quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "is_bitsandbytes_available", lambda: True)
    cuda, bf16 = torch.device("cuda", 0), torch.bfloat16
    assert choose_quantization(make_plan(tmp_path), cuda, bf16) is None
    assert choose_quantization(make_plan(tmp_path, method="Full", lora=None), cuda, bf16) is None
    assert choose_quantization(make_plan(tmp_path, **NF4), cuda, bf16) == Nf4(cuda, bf16)


def test_an_image_without_bitsandbytes_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"method\.lora\.quantization: .* bitsandbytes, which this trainer image lacks"):
        choose_quantization(make_plan(tmp_path, **NF4), torch.device("cuda", 0), torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_fallback_to_cpu_is_refused(tmp_path: Path) -> None:
    plan = make_training(tmp_path, device={"gpus": 1, "allow_cpu_fallback": True}, **NF4)
    with pytest.raises(UserError, match=r"method\.lora\.quantization: NF4 needs a CUDA GPU") as caught:
        run(plan, Telemetry(Stage.TRAIN, plan.job, 0))
    assert caught.value.reason is Reason.ACCELERATOR_MISSING
