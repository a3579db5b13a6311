"""The stage and its model: whether it fits the task and the data is told before a GPU waits."""

import json
import shutil
from pathlib import Path

import pytest
from finetune_api.constants import Reason
from finetune_api.spec import MethodType, Task
from finetune_trainer.errors import UserError
from finetune_trainer.fetch_model import MARKER
from transformers import AutoTokenizer

from tests.models import save_tiny_bert
from tests.unit.trainer.prepare_runs import prepare, sentiment, write_jsonl


def test_the_parameters_are_those_of_the_model(tmp_path, plan, models):
    from transformers import AutoModel

    prepared = prepare(plan(write_jsonl(tmp_path / "a.jsonl", sentiment(100))))
    assert prepared.model.parameters == AutoModel.from_pretrained(models[Task.CLASSIFICATION]).num_parameters()


def test_rows_are_never_longer_than_the_models_context(tmp_path, plan):
    file = write_jsonl(tmp_path / "a.jsonl", sentiment(50))
    short = save_tiny_bert(tmp_path / "short", context_length=16)
    prepared = prepare(plan(file, model=short, training={"max_length": 512}))
    assert prepared.data.max_length == prepared.model.context_length == 16


def broken(folder: Path, models, task: Task = Task.CLASSIFICATION, **config) -> Path:
    shutil.copytree(models[task], folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "no-such-model"}, "does not know"),
        ({"model_type": "vit"}, "of type 'vit', which cannot be used for task Classification"),
        ({"auto_map": {"AutoConfig": "code.Config"}, "model_type": "own"}, "model.trustRemoteCode"),
    ],
)
def test_a_model_of_the_wrong_kind_is_refused(tmp_path, plan, models, config, words):
    this = plan(write_jsonl(tmp_path / "a.jsonl", sentiment(50)), model=broken(tmp_path / "m", models, **config))
    with pytest.raises(UserError, match=words) as caught:
        prepare(this)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_an_encoder_cannot_generate(tmp_path, plan, models):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t {n}"} for n in range(50)])
    with pytest.raises(UserError, match=r"\(BertModel\) is an encoder"):
        prepare(plan(file, task=Task.GENERATION, model=models[Task.CLASSIFICATION]))


def test_a_decoder_can_classify(tmp_path, plan, models):
    file = write_jsonl(tmp_path / "a.jsonl", sentiment(50))
    assert prepare(plan(file, model=models[Task.GENERATION])).data.rows_kept == 50


@pytest.mark.parametrize("damage", ["shard", "weights", "tokenizer"])
def test_a_damaged_model_is_named(tmp_path, plan, models, damage):
    folder = broken(tmp_path / "m", models)
    weights = folder / "model.safetensors"
    if damage == "shard":
        weights.rename(folder / "model-00001-of-00002.safetensors")
        names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        words = "lacks 1 of its 2 weight files, for example model-00002-of-00002.safetensors"
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-100])
        words = "damaged weight file: model.safetensors"
    else:
        (folder / "tokenizer.json").write_text("{")
        words = "tokenizer"
    with pytest.raises(UserError, match=words) as caught:
        prepare(plan(write_jsonl(tmp_path / "a.jsonl", sentiment(50)), model=folder))
    assert caught.value.reason is Reason.MODEL_INVALID
    assert caught.value.exit_code == 64


def test_pickled_weights_need_to_be_allowed(tmp_path, plan, models):
    import torch
    from safetensors.torch import load_file

    folder = broken(tmp_path / "m", models)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    this = plan(write_jsonl(tmp_path / "a.jsonl", sentiment(50)), model=folder)
    with pytest.raises(UserError, match=r"model\.allowPickle"):
        prepare(this)
    allowed = this.model_copy(update={"model": this.model.model_copy(update={"allow_pickle": True})})
    assert prepare(allowed).model.parameters == sum(w.numel() for w in weights.values())


def test_another_model_takes_the_place_of_the_first(tmp_path, plan, models):
    file = write_jsonl(tmp_path / "a.jsonl", sentiment(50))
    this = plan(file)
    prepare(this)
    marker = Path(this.workspace) / "model" / MARKER
    before = marker.stat().st_ino
    prepare(this)
    assert marker.stat().st_ino == before
    assert prepare(plan(file, model=models[Task.GENERATION])).model.architecture == "LlamaForCausalLM"
    assert prepare(this).model.architecture == "BertModel"


def test_a_padding_token_without_an_embedding_is_told_before_a_gpu_waits(tmp_path, plan, models):
    folder = tmp_path / "m"
    shutil.copytree(models[Task.GENERATION], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t {n}"} for n in range(50)])
    with pytest.raises(UserError, match="pads with token 320, but it has only 320 embeddings") as caught:
        prepare(plan(file, task=Task.GENERATION, model=folder))
    assert caught.value.reason is Reason.MODEL_INVALID


def test_layers_that_the_model_does_not_have_are_told_before_a_gpu_waits(tmp_path, plan):
    full = {"method": MethodType.FULL, "lora": None}
    file = write_jsonl(tmp_path / "a.jsonl", sentiment(50))
    with pytest.raises(UserError, match=r"method\.trainable\.lastLayers: 3 layers .* has 2; leave") as caught:
        prepare(plan(file).model_copy(update={**full, "last_layers": 3}))
    assert caught.value.reason is Reason.INVALID_SPEC
    prepare(plan(file).model_copy(update={**full, "last_layers": 2}))
