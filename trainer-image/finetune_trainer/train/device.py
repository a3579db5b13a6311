"""The device that the pod got, and what it can do."""

import logging
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from finetune_api.constants import Reason
from finetune_api.plan import PlanDevice
from finetune_api.spec import Precision

from finetune_trainer.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    torch_device: torch.device
    precision: Precision
    name: str
    """For people: 'NVIDIA H100 80GB HBM3' or 'cpu'."""

    @property
    def most_padding(self) -> int:
        """Tokens of padding whose computing takes about as long as one more forward and backward pass."""
        return 8192 if self.torch_device.type == "cuda" else 64

    def autocast(self) -> AbstractContextManager[None]:
        """Computes in bf16 if that is the precision; weights that require grad stay fp32."""
        return torch.autocast(self.torch_device.type, torch.bfloat16, enabled=self.precision is Precision.BF16)

    def peak_memory(self) -> int:
        """Bytes: held by the accelerator's allocator, or resident on CPU; the most since the process began."""
        if self.torch_device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self.torch_device))
        return _peak_resident()

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type in which matrices are multiplied."""
        return torch.bfloat16 if self.precision is Precision.BF16 else torch.float32


def _peak_resident(status: Path = Path("/proc/self/status")) -> int:
    """Bytes. Linux' own count; that of getrusage(2) begins with the memory of the process that started this one."""
    try:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def choose_device(wanted: PlanDevice, precision: Precision | None, number: int = 0) -> Device:
    """The pod's GPU of that number, or its CPU.

    Raises UserError (AcceleratorMissing) if GPUs were asked for and are not all there: never CPU in silence.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < wanted.gpus:
        if found or not wanted.allow_cpu_fallback:
            raise UserError(Reason.ACCELERATOR_MISSING, _missing(wanted.gpus, found))
        logger.warning("resources.gpus is %d, but no CUDA device was found: training on CPU", wanted.gpus)
    if wanted.gpus > 0 and found:
        torch.set_float32_matmul_precision("high")  # TF32
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        device, name = torch.device("cuda", number), torch.cuda.get_device_name(number)
    else:
        has_bf16, device, name = False, torch.device("cpu"), "cpu"
    return Device(device, precision or (Precision.BF16 if has_bf16 else Precision.FP32), name)


def _missing(gpus: int, there: int) -> str:
    if there:
        return f"resources.gpus asks for {gpus} GPUs on each node, but torch finds {there} in this pod"
    build = torch.version.cuda
    found = (
        "torch finds no CUDA device in this pod (does the node have a CUDA driver that is recent enough?)"
        if build
        else "the trainer image holds a torch built for CPU only"
    )
    return f"resources.gpus asks for {gpus} GPU, but {found}; set resources.allowCpuFallback: true to train on CPU"


def cast_frozen(model: "PreTrainedModel | PeftModel", precision: Precision) -> None:
    """With bf16, keeps the frozen weights of linear layers in bf16.

    Autocast would cast them anew in every forward pass, with the same result, and they are most of the memory.
    """
    if precision is Precision.BF16:
        for layer in castable_layers(model):
            layer.to(torch.bfloat16)


def castable_layers(model: "PreTrainedModel | PeftModel") -> Iterator[torch.nn.Linear]:
    """Linear layers that are not trained, whose weights may be kept in less than fp32.

    The output layer's stay as they are, adapted or not, and so do those that are the input embeddings' too, and
    quantised ones.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    kept = {id(end.weight) for end in ends if end is not None}  # of an adapted layer it is the base layer's
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear) or id(module.weight) in kept:
            continue
        frozen = not any(weight.requires_grad for weight in module.parameters())
        if frozen and module.weight.is_floating_point():
            yield module
