"""Several processes that train one model: which part of the work each does, and what they tell each other.

A step is cut into micro-batches as one process would cut it, and these are dealt out: so the number of processes
changes nothing but the order of summation. Every method here is called by all processes at the same place; `World`
itself is one process alone, which has nobody to ask.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from finetune_api.plan import Plan
from finetune_api.spec import MethodType
from torch.nn.utils import clip_grad_norm_

from finetune_trainer.launch import is_worker
from finetune_trainer.workspace import new_folder

T = TypeVar("T")

SILENCE = timedelta(minutes=10)
"""After which a process that answers nothing is given up; one that has died is noticed at once."""

PATIENCE = timedelta(hours=1)
"""The same where the first process writes files and the others wait for it."""


@dataclass(frozen=True)
class Share:
    """The micro-batches that fall to one process."""

    numbers: list[int]
    """Their places among all that were dealt out."""
    idle: int
    """Turns that are left to others when these are done: all processes have as many turns."""


def deal(costs: Sequence[int], processes: int) -> list[Share]:
    """Deals micro-batches of such costs out: in their order, each to the process that has least so far."""
    loads = [(0, process) for process in range(processes)]
    numbers: list[list[int]] = [[] for _ in range(processes)]
    for number, cost in enumerate(costs):
        load, process = heapq.heappop(loads)
        numbers[process].append(number)
        heapq.heappush(loads, (load + cost, process))
    turns = max(map(len, numbers))
    return [Share(own, turns - len(own)) for own in numbers]


class World:
    """One process that trains alone."""

    rank = 0
    size = 1
    is_sharded = False
    """Whether the weights are spread over the processes, so that a pass of one needs all others to make one too."""
    control: Any = None
    """The process group for what is not on the device."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    def place(self, model: torch.nn.Module, device: torch.device) -> None:
        """Brings the model to the device."""
        model.to(device)

    def share(self, costs: Sequence[int]) -> Share:
        """Which of the micro-batches of such costs are this process's."""
        return deal(costs, self.size)[self.rank]

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        return wish

    def total(self, *counts: int) -> list[int]:
        """The sums over all processes."""
        return list(counts)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        return [value]

    def from_main(self, produce: Callable[[], T]) -> T:
        """What `produce` returns in the first process, where alone it is called. The others wait for it."""
        return produce()

    def sum_gradients(
        self, weights: list[torch.nn.Parameter], only: list[torch.nn.Parameter] | None, loss: torch.Tensor
    ) -> torch.Tensor:
        """Makes the gradients those of all processes' losses; returns the sum of the losses. With `only`, no other
        weights have gradients."""
        return loss

    def clip(self, weights: list[torch.nn.Parameter], most: float) -> torch.Tensor:
        """Scales the gradients down to a norm of at most `most`; returns what it was."""
        return clip_grad_norm_(weights, most)

    def same(self, weights: Sequence[torch.Tensor]) -> None:
        """Makes weights that all processes hold the same as the first one's."""

    @contextmanager
    def new_folder(self, path: Path) -> Iterator[Path]:
        """`workspace.new_folder` for all: each may write files of its own, and it takes its place when all are done."""
        with ExitStack() as stack:
            yield self.from_main(lambda: stack.enter_context(new_folder(path)))
            self.gather(None)
            self.from_main(stack.close)


ALONE = World()


class Replicas(World):
    """Processes that each hold the whole model and add up their gradients."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.control = dist.new_group(backend="gloo", timeout=PATIENCE)

    def place(self, model: torch.nn.Module, device: torch.device) -> None:
        model.to(device)
        self.same([weight for weight in model.parameters() if weight.requires_grad])

    def agree(self, wish: bool) -> bool:
        return self.total(int(wish))[0] > 0

    def total(self, *counts: int) -> list[int]:
        sums = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(sums, group=self.control)
        return [int(number) for number in sums.tolist()]

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, produce: Callable[[], T]) -> T:
        values: list[Any] = [produce() if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self.control)
        value: T = values[0]
        return value

    def sum_gradients(
        self, weights: list[torch.nn.Parameter], only: list[torch.nn.Parameter] | None, loss: torch.Tensor
    ) -> torch.Tensor:
        trained = weights if only is None else only
        # one without a gradient anywhere stays without: the optimizer leaves it alone
        anywhere = self.total(*(weight.grad is not None for weight in trained))
        reached = [weight for weight, count in zip(trained, anywhere, strict=True) if count]
        for weight in reached:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in reached if weight.grad is not None]
        whole = torch.cat([*(gradient.flatten() for gradient in gradients), loss.float().view(1)])
        dist.all_reduce(whole)
        *parts, summed = torch.split(whole, [*(gradient.numel() for gradient in gradients), 1])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return summed[0].double()

    def same(self, weights: Sequence[torch.Tensor]) -> None:
        for weight in weights:
            dist.broadcast(weight.detach(), src=0)


@contextmanager
def join(plan: Plan, device: torch.device) -> Iterator[World]:
    """The world that this process is part of. It ends together: none leaves before all are done."""
    if not is_worker():
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=SILENCE)
    world = Replicas()
    if plan.method is MethodType.FULL:
        from finetune_trainer.train.sharding import Shards

        world = Shards(device)
    yield world
    world.gather(None)
    dist.destroy_process_group()
