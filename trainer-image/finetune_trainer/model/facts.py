"""What is known of a model before its weights are loaded, and whether it fits the task."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from finetune_api.constants import Reason
from finetune_api.spec import Task
from finetune_api.status import ModelStatus
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from finetune_trainer.errors import UserError
from finetune_trainer.fetch_model import INDEX
from finetune_trainer.model.adapters import too_few_layers

AUTO_CLASSES = {
    Task.CLASSIFICATION: ("AutoModelForSequenceClassification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    Task.GENERATION: ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}
CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel")

OFFSET_POSITIONS = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet")
"""Models whose positions begin behind the padding id (fairseq): so many of their positions hold no token."""

UNLIMITED = 10**9
"""tokenizer.model_max_length is astronomical where nobody set it."""


def load_config(folder: Path, trust_remote_code: bool) -> Any:
    """The model's config. Raises UserError (ModelInvalid)."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise _invalid(
                "needs code of its own: set model.trustRemoteCode if you have read it and trust it"
            ) from None
        raise _invalid("has a config.json of a kind that this version of transformers does not know") from error


def check_task(config: Any, task: Task) -> None:
    """Raises UserError (ModelInvalid) if transformers has no class for the task, or the weights are an encoder's."""
    auto_class, known = AUTO_CLASSES[task]
    if auto_class in (getattr(config, "auto_map", None) or {}):
        return
    kind = config.model_type
    if kind not in known:
        raise _invalid(f"is of type '{kind}', which cannot be used for task {task.value}")
    architecture = _architecture(config)
    both = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if task is Task.GENERATION and both and not architecture.endswith(CAUSAL_CLASSES):
        raise _invalid(f"({architecture}) is an encoder, it cannot generate text: use a causal language model")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, task: Task, vocabulary_size: int | None = None) -> None:
    """Raises UserError (ModelInvalid) if it cannot end a generated text, or pads with what the model does not know."""
    padding = tokenizer.pad_token_id
    if vocabulary_size is not None and isinstance(padding, int) and padding >= vocabulary_size:
        raise _invalid(f"has a tokenizer that pads with token {padding}, but it has only {vocabulary_size} embeddings")
    if tokenizer.eos_token_id is None and task is Task.GENERATION:
        raise _invalid("has a tokenizer without an end-of-text token, which Generation needs")


def check_layers(model: ModelStatus, last_layers: int | None) -> None:
    """Raises UserError (InvalidSpec) if more layers are to be trained than the model is known to have."""
    if last_layers is not None and model.layers is not None and last_layers > model.layers:
        raise too_few_layers(last_layers, model.architecture, model.layers)


def context_length(config: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Longest input in tokens; None if neither the model nor its tokenizer sets a limit."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if positions is not None and text.model_type in OFFSET_POSITIONS:
        positions -= (text.pad_token_id or 0) + 1
    limits = [positions, tokenizer.model_max_length if tokenizer is not None else None]
    return min((int(limit) for limit in limits if limit and 0 < limit < UNLIMITED), default=None)


def read_facts(folder: Path, config: Any, revision: str | None = None) -> ModelStatus:
    """Facts for the status; the parameters are counted from the headers of the weight files.

    Raises UserError (ModelInvalid) if a weight file is missing or damaged.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    return ModelStatus(
        architecture=_architecture(config)[:128],
        revision=revision,
        parameters=sum(_parameter_counts(folder)),
        layers=getattr(text, "num_hidden_layers", None),
        hidden_size=getattr(text, "hidden_size", None),
        vocabulary_size=getattr(text, "vocab_size", None),
        intermediate_size=_intermediate_size(text),
        attention_heads=heads,
        key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        context_length=context_length(config),
        tied_embeddings=getattr(config, "tie_word_embeddings", None),
    )


def _intermediate_size(text: Any) -> int | None:
    """Of the feed-forward network; of a mixture of experts, that of all experts that one token goes through."""
    names = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff")
    dense = next((size for name in names if (size := getattr(text, name, None))), None)
    expert, experts = getattr(text, "moe_intermediate_size", None), getattr(text, "num_experts_per_tok", None)
    if expert and experts:
        return int(expert * experts)
    width = getattr(text, "hidden_size", None)
    return dense if dense else width and 4 * width  # GPT-2 leaves the usual width out


def _architecture(config: Any) -> str:
    return str((config.architectures or [type(config).__name__.replace("Config", "Model")])[0])


def _parameter_counts(folder: Path) -> Iterator[int]:
    index = folder / INDEX
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise _invalid(f"has a damaged {INDEX}") from None
        missing = sorted(wanted - set(names))
        if missing:
            raise _invalid(f"lacks {len(missing)} of its {len(wanted)} weight files, for example {missing[0]}")
    for name in names:
        yield from _safetensors_counts(folder / name)
    for path in sorted(folder.glob("*.bin")):
        yield from _pickle_counts(path)


def _safetensors_counts(path: Path) -> Iterator[int]:
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (a handle of safetensors is no dict)
                tensor = file.get_slice(name)
                if "F" in tensor.get_dtype():  # integers are buffers
                    yield prod(tensor.get_shape())
    except SafetensorError:
        raise _invalid(f"has a damaged weight file: {path.name}") from None


def _pickle_counts(path: Path) -> Iterator[int]:
    import pickle

    import torch

    try:
        weights = torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise _invalid(f"has a damaged weight file, or one that holds more than weights: {path.name}") from None
    for tensor in weights.values():
        if tensor.is_floating_point():
            yield tensor.numel()


def _invalid(what: str) -> UserError:
    return UserError(Reason.MODEL_INVALID, f"model.uri: the model {what}")
