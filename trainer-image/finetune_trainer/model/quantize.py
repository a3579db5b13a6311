"""QLoRA: the frozen linear layers of the transformer blocks in NF4 while adapters beside them are trained.

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314; bitsandbytes does the work.
"""

from dataclasses import dataclass
from typing import Any

import torch
from finetune_api.constants import Reason
from finetune_api.plan import Plan
from finetune_api.spec import Quantization
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from finetune_trainer.errors import UserError
from finetune_trainer.model.adapters import LINEAR, block_linears

FIELD = "method.lora.quantization"


@dataclass(frozen=True)
class Nf4:
    """4-bit NormalFloat, with its scales in 8 bits."""

    device: torch.device
    """Where the layers are quantised and stay."""
    compute: torch.dtype
    """What they multiply in."""

    def loading(self, skeleton: PreTrainedModel) -> dict[str, Any]:
        """Settings of `from_pretrained` for a model like `skeleton`, whose weights do not matter (meta).

        Embeddings, heads and the output layer stay as they are: they are trained, or are what errors hurt most.
        """
        blocks = set(block_linears(skeleton))
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.compute,
            llm_int8_skip_modules=[
                name for name, layer in skeleton.named_modules() if isinstance(layer, LINEAR) and name not in blocks
            ],
        )
        return {"quantization_config": config, "device_map": {"": self.device}}


def choose_quantization(plan: Plan, device: torch.device, compute: torch.dtype) -> Nf4 | None:
    """How the plan wants the frozen layers on this device; None: as they are. Raises UserError if that cannot be."""
    if plan.lora is None or plan.lora.quantization is not Quantization.NF4:
        return None
    if device.type != "cuda":
        raise UserError(
            Reason.ACCELERATOR_MISSING,
            f"{FIELD}: NF4 needs a CUDA GPU, and this pod trains on {device.type} (resources.allowCpuFallback does not "
            "help here): let it have a GPU, or leave quantization out",
        )
    if not is_bitsandbytes_available():
        raise UserError(
            Reason.INVALID_SPEC,
            f"{FIELD}: NF4 needs the package bitsandbytes, which this trainer image lacks (it is installed on Linux "
            "x86_64 only): use an image that has it, or leave quantization out",
        )
    return Nf4(device, compute)
