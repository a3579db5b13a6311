"""The model of a job: what is trained, what is frozen, and which models are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.constants import Reason
from finetune_trainer.errors import StageError, UserError
from finetune_trainer.model.adapters import head_weights
from finetune_trainer.model.load import build_model, load_tokenizer, load_trainable_state, trainable_state
from finetune_trainer.workspace import Workspace
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from tests.models import save_tiny_bert, save_tiny_llama
from tests.plans import make_plan
from tests.unit.trainer.training_workspace import GENERATION, untie

LABELS = ["negative", "neutral", "positive"]
HEAD = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


@pytest.fixture
def bert(tmp_path: Path) -> Workspace:
    save_tiny_bert(tmp_path / "model")
    return Workspace(tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Workspace:
    save_tiny_llama(tmp_path / "model")
    return Workspace(tmp_path)


def build(workspace: Workspace, labels: list[str] | None = LABELS, **changes: Any) -> torch.nn.Module:
    plan = make_plan(workspace.root, **changes)
    return build_model(plan, workspace, labels if plan.task == "Classification" else None)


def edit_config(workspace: Workspace, **changes: Any) -> None:
    path = workspace.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(workspace: Workspace, drop: str) -> None:
    path = workspace.model / "model.safetensors"
    weights = load_file(path)
    save_file({name: w.clone() for name, w in weights.items() if drop not in name}, path, {"format": "pt"})


def lora_targets(model: torch.nn.Module) -> set[str]:
    return {
        name.split(".lora_A")[0].removeprefix("base_model.model.")
        for name in trainable_state(model)
        if "lora_A" in name
    }


def test_lora_adapts_all_linear_layers_of_the_blocks_and_trains_the_head_in_full(bert: Workspace) -> None:
    model = build(bert)
    layers = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
              "intermediate.dense", "output.dense"]  # fmt: skip
    assert lora_targets(model) == {f"bert.encoder.layer.{block}.{layer}" for block in (0, 1) for layer in layers}
    in_full = {name for name in trainable_state(model) if "lora_" not in name}
    assert {name.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for name in in_full} == HEAD


def test_lora_for_generation_leaves_embeddings_and_output_layer_alone(llama: Workspace) -> None:
    model = build(llama, **GENERATION)
    assert {name.rsplit(".", 1)[-1] for name in lora_targets(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all("lora_" in name for name in trainable_state(model))


def test_lora_adapts_the_named_layers_only(bert: Workspace) -> None:
    model = build(bert, lora={"target_modules": ["query", "value"]})
    assert {name.rsplit(".", 1)[-1] for name in lora_targets(model)} == {"query", "value"}


def test_layers_that_do_not_exist_are_answered_with_those_that_do(bert: Workspace) -> None:
    with pytest.raises(UserError, match=r"method\.lora\.targetModules: q_proj .* called dense, key, query, value"):
        build(bert, lora={"target_modules": ["q_proj"]})


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_lora_refuses_a_layer_that_shares_its_weights(llama: Workspace, name: str) -> None:
    with pytest.raises(UserError, match=rf"method\.lora\.targetModules: {name} of LlamaForCausalLM.*share") as caught:
        build(llama, lora={"target_modules": ["q_proj", name]}, **GENERATION)
    assert caught.value.reason is Reason.INVALID_SPEC
    untie(llama)
    assert any(
        name in layer for layer in lora_targets_of_any_kind(build(llama, lora={"target_modules": [name]}, **GENERATION))
    )


def lora_targets_of_any_kind(model: torch.nn.Module) -> set[str]:
    return {name for name in trainable_state(model) if "lora_" in name}


def test_dora_trains_the_length_of_every_adapted_weight_too(bert: Workspace) -> None:
    names = [name for name in trainable_state(build(bert, lora={"variant": "DoRA"})) if "lora_magnitude_vector" in name]
    assert len(names) == 12


@pytest.mark.parametrize(("variant", "scale"), [("LoRA", 2.0), ("RsLoRA", 4.0), ("DoRA", 2.0)])
def test_the_variant_decides_the_scale(bert: Workspace, variant: str, scale: float) -> None:
    layers = build(bert, lora={"variant": variant, "rank": 4, "alpha": 8}).modules()
    assert {layer.scaling["default"] for layer in layers if isinstance(layer, LoraLayer)} == {scale}


def test_dora_starts_as_the_untuned_model(llama: Workspace) -> None:
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        adapted = build(llama, lora={"variant": "DoRA"}, **GENERATION).eval()(input_ids=ids).logits
        plain = build(llama, method="Full", **GENERATION).eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted, plain, atol=1e-5, rtol=0)


def test_lora_starts_as_the_untuned_model(llama: Workspace) -> None:
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        adapted = build(llama, **GENERATION).eval()(input_ids=ids).logits
        plain = build(llama, method="Full", **GENERATION).eval()(input_ids=ids).logits
    assert torch.equal(adapted, plain)


def test_head_trains_the_head_only(bert: Workspace) -> None:
    assert set(trainable_state(build(bert, method="Head"))) == HEAD


def test_a_decoder_can_classify(llama: Workspace) -> None:
    model = build(llama, method="Head")
    assert set(trainable_state(model)) == {"score.weight"}
    ids = torch.tensor([[40, 41, 42], [40, 0, 0]])  # 0 pads
    model.eval()
    both = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    alone = model(input_ids=ids[1:, :1]).logits
    assert both.shape == (2, 3)
    torch.testing.assert_close(both[1:], alone)


def test_full_trains_every_weight_once(llama: Workspace) -> None:
    model = build(llama, method="Full", **GENERATION)
    assert sum(w.numel() for w in trainable_state(model).values()) == sum(w.numel() for w in model.parameters())
    assert "lm_head.weight" not in trainable_state(model)  # tied to the embeddings


def parts(model: torch.nn.Module) -> set[str]:
    """Modules with trained weights: down to the block."""
    return {name.rsplit(".", 1)[0].split(".self_attn")[0].split(".mlp")[0] for name in trainable_state(model)}


def test_the_last_layers_of_a_generator_are_trained_with_the_final_norm(llama: Workspace) -> None:
    block = {"model.layers.1", "model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"}
    tied = build(llama, method="Full", last_layers=1, **GENERATION)
    assert parts(tied) == block | {"model.norm"}
    untie(llama)
    assert parts(build(llama, method="Full", last_layers=1, **GENERATION)) == block | {"model.norm", "lm_head"}
    every = parts(build(llama, method="Full", last_layers=2, **GENERATION))
    assert "model.layers.0" in every
    assert "model.embed_tokens" not in every


def test_the_last_layers_of_a_classifier_are_trained_with_the_head(bert: Workspace) -> None:
    names = set(trainable_state(build(bert, method="Full", last_layers=1)))
    assert {name for name in names if not name.startswith("bert.encoder.layer.1.")} == HEAD
    assert len(names) == len(HEAD) + 16


def opt() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
    return OPTForCausalLM(OPTConfig(vocab_size=320, word_embed_proj_dim=32, max_position_embeddings=128, **sizes))


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=2))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2))


@pytest.mark.parametrize(
    ("make", "norm"), [(gpt2, "transformer.ln_f"), (opt, "model.decoder.final_layer_norm"), (bloom, "transformer.ln_f")]
)
def test_the_final_norm_is_found_wherever_it_stands(llama: Workspace, make: Callable, norm: str) -> None:
    make().save_pretrained(llama.model)
    names = trainable_state(build(llama, method="Full", last_layers=1, **GENERATION))
    assert {name.rsplit(".", 1)[0] for name in names if ".1." not in name} == {norm}


def test_more_layers_than_there_are_cannot_be_trained(bert: Workspace) -> None:
    with pytest.raises(UserError, match=r"lastLayers: 3 layers .* BertForSequenceClassification has 2; ") as caught:
        build(bert, method="Full", last_layers=3)
    assert caught.value.reason is Reason.INVALID_SPEC


@pytest.mark.parametrize("changes", [{}, {"method": "Full"}, {"method": "Full", "last_layers": 1}])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_weights_of_the_head_are_found_under_any_method(
    name: str, request: pytest.FixtureRequest, changes: dict[str, Any]
) -> None:
    workspace = request.getfixturevalue(name)
    model = build(workspace, **changes)
    head = trainable_state(build(workspace, method="Head"))
    found = head_weights(model)
    assert sorted(w.shape for w in found) == sorted(w.shape for w in head.values())
    assert {id(w) for w in found} <= {id(w) for w in model.parameters() if w.requires_grad}


@pytest.mark.parametrize("method", ["LoRA", "Full", "Head"])
def test_the_seed_decides_the_fresh_weights_and_no_other_randomness_is_touched(bert: Workspace, method: str) -> None:
    before = torch.get_rng_state()
    first = trainable_state(build(bert, method=method))
    torch.rand(3)
    second = trainable_state(build(bert, method=method))
    other = trainable_state(build(bert, method=method, training={"seed": 8}))
    torch.set_rng_state(before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    build(bert, method=method)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["LoRA", "Full", "Head"])
def test_trained_weights_make_the_round_trip(bert: Workspace, tmp_path: Path, method: str) -> None:
    trained = build(bert, method=method)
    with torch.no_grad():
        for weight in trainable_state(trained).values():
            weight.add_(torch.randn_like(weight))
    save_file({name: w.contiguous() for name, w in trainable_state(trained).items()}, tmp_path / "weights.safetensors")
    model = build(bert, method=method)
    load_trainable_state(model, tmp_path / "weights.safetensors")
    ids = torch.arange(5, 15)[None]
    assert torch.equal(model.eval()(input_ids=ids).logits, trained.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("changes", [{"lora": {"rank": 8}}, {"method": "Head"}])
def test_weights_of_another_method_are_refused(bert: Workspace, tmp_path: Path, changes: dict[str, Any]) -> None:
    save_file(dict(trainable_state(build(bert, **changes))), tmp_path / "weights.safetensors")
    with pytest.raises(StageError, match="from another model or method"):
        load_trainable_state(build(bert), tmp_path / "weights.safetensors")


def test_labels_stand_in_the_config(bert: Workspace) -> None:
    config = build(bert, method="Full").config
    assert config.id2label == dict(enumerate(LABELS))
    assert config.problem_type == "single_label_classification"


def test_a_head_for_other_labels_is_replaced(bert: Workspace) -> None:
    other = AutoModelForSequenceClassification.from_pretrained(bert.model, num_labels=5)
    other.save_pretrained(bert.model)
    assert trainable_state(build(bert, method="Head"))["classifier.weight"].shape == (3, 32)


def test_a_model_with_a_head_of_another_kind_can_classify(bert: Workspace) -> None:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig.from_pretrained(bert.model)).save_pretrained(bert.model)
    model = build(bert, method="Head")  # its pooler is missing too
    assert set(trainable_state(model)) == HEAD


def test_another_architecture_finds_its_own_head_and_blocks(bert: Workspace) -> None:
    config = RobertaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(bert.model)
    model = build(bert)
    assert len(lora_targets(model)) == 12
    full = {n for n in trainable_state(model) if "lora_" not in n}
    assert {n.split(".")[2] for n in full} == {"classifier"}
    assert len(full) == 4


@pytest.mark.parametrize("drop", ["encoder.layer.1.attention.self.query.weight", "word_embeddings"])
def test_missing_weights_other_than_the_head_are_refused(bert: Workspace, drop: str) -> None:
    edit_weights(bert, drop)
    with pytest.raises(UserError, match=drop) as caught:
        build(bert)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_weights_of_another_size_are_refused(bert: Workspace) -> None:
    edit_config(bert, intermediate_size=48)
    with pytest.raises(UserError, match=r"encoder\.layer\.0.* and \d+ more of the shape"):
        build(bert)


def test_blocks_that_the_config_forgot_are_refused(bert: Workspace) -> None:
    edit_config(bert, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"encoder\.layer\.1.*config\.json does not describe"):
        build(bert)


def test_an_encoder_cannot_generate(bert: Workspace) -> None:
    with pytest.raises(UserError, match="cls"):
        build(bert, **GENERATION)


def test_pickled_weights_are_read_only_if_the_plan_allows_it(bert: Workspace) -> None:
    weights = bert.model / "model.safetensors"
    torch.save(load_file(weights), bert.model / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match="safetensors"):
        build(bert)
    assert trainable_state(build(bert, model={"allow_pickle": True}))


def test_code_of_the_model_does_not_run_unless_the_plan_allows_it(bert: Workspace, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nfrom transformers import BertConfig\nclass Own(BertConfig):\n    model_type = 'own'\n"
    (bert.model / "own.py").write_text(code)
    edit_config(bert, model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(UserError):
        build(bert)
    assert not ran.exists()


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(llama: Workspace) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama.model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(llama.model)
    assert load_tokenizer(llama).pad_token == "</s>"
    assert build(llama, **GENERATION).config.pad_token_id == 2


def test_a_tokenizer_that_can_neither_pad_nor_end_is_refused(bert: Workspace) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert.model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bert.model)
    with pytest.raises(UserError, match="neither a padding nor an end-of-text token"):
        build(bert)


def test_a_padding_token_without_an_embedding_is_refused(llama: Workspace) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama.model)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(llama.model)
    with pytest.raises(UserError, match="pads with token 320, but it has only 320 embeddings"):
        build(llama, **GENERATION)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"model\.uri"):
        build(Workspace(tmp_path))
