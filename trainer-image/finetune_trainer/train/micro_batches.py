"""How the rows of an optimizer step are cut into micro-batches, and what the model sees of one."""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from finetune_api.spec import Task
from torch.nn import functional

from finetune_trainer.data.store import Rows
from finetune_trainer.train.batches import Indices
from finetune_trainer.train.distributed import World

CPU = torch.device("cpu")


def packs(rows: Indices, lengths: npt.NDArray[np.int32], most_tokens: int) -> list[Indices]:
    """Cuts rows into packs of about the same number of tokens, at most `most_tokens`; a longer row stands alone.

    The next longest row goes to the pack that has least so far (Graham 1969, https://doi.org/10.1137/0117039), so all
    packs need about as much time and memory as each other.
    """
    order = rows[np.argsort(-lengths[rows], kind="stable")].tolist()
    count = max(1, math.ceil(int(lengths[rows].sum()) / most_tokens))
    while True:
        filled: list[tuple[int, int]] = [(0, pack) for pack in range(count)]
        found: list[list[int]] = [[] for _ in range(count)]
        for row in order:
            tokens, pack = heapq.heappop(filled)
            found[pack].append(row)
            heapq.heappush(filled, (tokens + int(lengths[row]), pack))
        if all(tokens <= most_tokens or len(found[pack]) == 1 for tokens, pack in filled):
            return [np.array(pack, np.int64) for pack in found if pack]
        count += math.ceil(count / 10)


def padded_groups(
    rows: Indices, lengths: npt.NDArray[np.int32], most_tokens: int, most_padding: int | None = None
) -> list[Indices]:
    """Cuts rows into groups of at most `most_tokens` padded tokens; a longer row stands alone.

    Rows of similar length come together, the longest first: a size that does not fit the memory shows at once. A
    group ends before its padding passes `most_padding` tokens, where one more forward pass is the cheaper way.
    """
    order = rows[np.argsort(-lengths[rows], kind="stable")]
    groups, start = [], 0
    while start < len(order):
        longest = int(lengths[order[start]])
        count = max(1, most_tokens // max(1, longest))
        if most_padding is not None:
            padding = np.cumsum(longest - lengths[order[start : start + count]])
            count = int(np.searchsorted(padding, most_padding, side="right"))
        groups.append(order[start : start + count])
        start += count
    return groups


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed sequence begin and end."""

    lengths: tuple[int, ...]
    """Tokens of each, in their order."""
    device: torch.device = CPU

    @cached_property
    def starts(self) -> torch.Tensor:
        """The first token of each document and the end of the last: int32 [documents + 1] on the device."""
        return _move(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32), self.device)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees: b sequences of t tokens, n losses.

    Padded: a row is a sequence, padded on the right to the longest of them. Packed: the rows are documents that stand
    one behind the other in one sequence.
    """

    rows: Indices
    """Their numbers in the split, in the order of the tensors."""
    input_ids: torch.Tensor
    """int64 [b, t]"""
    targets: torch.Tensor
    """What is to be predicted, int64 [n]: class ids with n = b (Classification), or supervised tokens."""
    tokens: int
    """Tokens without padding."""
    attention_mask: torch.Tensor | None = None
    """int64 [b, t]: 1 for a token, 0 for padding; None if nothing is padded."""
    positions: torch.Tensor | None = None
    """The token before each target, counted through all b * t places: int64 [n] (Generation)."""
    features: torch.Tensor | None = None
    """What a frozen encoder says of each row, fp32 [b, width], where the head alone is run on that (Classification)."""
    documents: Documents | None = None
    """Set if it is packed."""
    position_ids: torch.Tensor | None = None
    """int64 [1, t], from 0 in each document (packed)."""
    document_targets: tuple[int, ...] = ()
    """How many of the targets each document has (Generation)."""
    reference: torch.Tensor | None = None
    """Of preference pairs, `Rows.reference`: fp32 [rows, 2]. There is then one loss per pair."""
    weights: torch.Tensor | None = None
    """How much each loss counts in training, fp32 [rows] (Classification); None: all the same."""

    @property
    def loss_count(self) -> int:
        """How many losses it has: one per target, or per pair."""
        return len(self.targets if self.reference is None else self.rows)

    @property
    def loss_weight(self) -> float:
        """What the mean of its losses is divided by: their number, or the sum of their weights. On the CPU only."""
        return self.loss_count if self.weights is None else float(self.weights.double().sum())

    def weigh(self, losses: torch.Tensor) -> torch.Tensor:
        """The losses [loss_count] as they count in training."""
        return losses if self.weights is None else losses * self.weights

    def lengthen(self, pad_token_id: int) -> "MicroBatch":
        """The packed sequence with padding up to the next `bucket`: one more document, without targets."""
        if self.documents is None or self.position_ids is None:
            raise ValueError("only a packed micro-batch can be lengthened")
        length = self.input_ids.shape[1]
        more = bucket(length) - length
        if more == 0:
            return self
        return replace(
            self,
            input_ids=functional.pad(self.input_ids, (0, more), value=pad_token_id),
            documents=replace(self.documents, lengths=(*self.documents.lengths, more)),
            position_ids=torch.cat([self.position_ids, torch.arange(more).unsqueeze(0)], dim=1),
        )

    def to(self, device: torch.device) -> "MicroBatch":
        if device.type == "cpu":
            return self
        return replace(
            self,
            input_ids=_move(self.input_ids, device),
            targets=_move(self.targets, device),
            attention_mask=self.attention_mask if self.attention_mask is None else _move(self.attention_mask, device),
            positions=self.positions if self.positions is None else _move(self.positions, device),
            features=self.features if self.features is None else _move(self.features, device),
            weights=self.weights if self.weights is None else _move(self.weights, device),
            documents=self.documents and replace(self.documents, device=device),
            position_ids=self.position_ids if self.position_ids is None else _move(self.position_ids, device),
        )


def bucket(length: int) -> int:
    """The next length of which there are at most eight between a power of two and the next: 12.5 % longer at most."""
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return math.ceil(length / step) * step


def _move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass
class Batching:
    """How rows become micro-batches."""

    task: Task
    packed: bool
    micro_batch_tokens: int
    """Most tokens of a micro-batch, padding included; `halve` lowers it."""
    pad_token_id: int
    most_padding: int | None = None
    """Tokens of padding that a padded micro-batch may have."""
    in_buckets: bool = False
    """Packs are lengthened, so that few lengths are different: each is another graph for torch.compile."""

    def cut(self, data: Rows, rows: Indices) -> list[Indices]:
        """The rows of each micro-batch."""
        if data.features is not None:  # a row is one vector, whatever its length
            return np.array_split(rows, math.ceil(len(rows) / self.micro_batch_tokens))
        if self.packed:
            return packs(rows, data.lengths, self.micro_batch_tokens)
        return padded_groups(rows, data.padded_lengths, self.micro_batch_tokens, self.most_padding)

    def read(self, data: Rows, rows: Indices) -> MicroBatch:
        """The micro-batch of these rows."""
        if data.features is not None:
            return MicroBatch(
                rows=rows,
                input_ids=torch.zeros(len(rows), 1, dtype=torch.long),
                targets=torch.from_numpy(_labels(data, rows)),
                tokens=int(data.lengths[rows].sum()),
                features=torch.from_numpy(data.features[rows]),
                weights=_weights(data, rows),
            )
        numbers = data.documents(rows).tolist()
        documents = [data.input_ids(number) for number in numbers]
        if self.task is Task.GENERATION:
            supervised = [data.loss_mask(number) for number in numbers]
            batch = arrange(documents, supervised, self.pad_token_id, self.packed)
            reference = None if data.reference is None else torch.from_numpy(data.reference[rows])
            batch = replace(batch, rows=rows, reference=reference)
            return batch.lengthen(self.pad_token_id) if self.in_buckets else batch
        batch = padded(documents, _labels(data, rows), self.pad_token_id)
        return replace(batch, rows=rows, weights=_weights(data, rows))

    def own_share(
        self, data: Rows, world: World, on_batch: Callable[[float], None]
    ) -> Iterator[tuple[MicroBatch, bool]]:
        """The micro-batches of a whole split that fall to this process, each with whether it counts.

        One that does not count is for a pass that others need, if the weights are sharded. `on_batch` is called before
        each, in all processes as often, with the share of the work that is done.
        """
        groups = self.cut(data, np.arange(len(data)))
        share = world.share([int(data.lengths[rows].sum()) for rows in groups])
        turns = len(share.numbers) + share.idle
        for turn in range(turns):
            on_batch(turn / turns)
            counts = turn < len(share.numbers)
            if counts or world.is_sharded:
                yield self.read(data, groups[share.numbers[turn] if counts else -1]), counts

    def halve(self, longest: int) -> bool:
        """Makes micro-batches half as large; False if the `longest` row would then not fit any more."""
        if self.micro_batch_tokens <= longest:
            return False
        self.micro_batch_tokens = max(longest, self.micro_batch_tokens // 2)
        return True


def padded(texts: Sequence[npt.NDArray[np.int64]], labels: npt.NDArray[np.int64], pad_token_id: int) -> MicroBatch:
    """A micro-batch of labelled texts."""
    ids, inside = _pad(texts, pad_token_id)
    return MicroBatch(
        rows=np.arange(len(texts)),
        input_ids=torch.from_numpy(ids),
        targets=torch.from_numpy(labels),
        tokens=int(inside.sum()),
        attention_mask=_mask(inside),
    )


def arrange(
    documents: Sequence[npt.NDArray[np.int64]],
    supervised: Sequence[npt.NDArray[np.bool_]],
    pad_token_id: int,
    packed: bool,
) -> MicroBatch:
    """A micro-batch of documents. The first token of one has no token before it, so it is never a target."""
    lengths = [len(document) for document in documents]
    learned = np.concatenate([np.append(mask[1:], False) for mask in supervised])  # seen from the token before
    tokens = np.concatenate(documents)
    before = np.flatnonzero(learned)
    targets = torch.from_numpy(tokens[before + 1])
    rows = np.arange(len(documents))
    counts = tuple(int(np.count_nonzero(mask[1:])) for mask in supervised)
    if packed:
        return MicroBatch(
            rows=rows,
            document_targets=counts,
            input_ids=torch.from_numpy(tokens).unsqueeze(0),
            targets=targets,
            tokens=len(tokens),
            positions=torch.from_numpy(before),
            documents=Documents(tuple(lengths)),
            position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).unsqueeze(0),
        )
    ids, inside = _pad(documents, pad_token_id)
    return MicroBatch(
        rows=rows,
        document_targets=counts,
        input_ids=torch.from_numpy(ids),
        targets=targets,
        tokens=len(tokens),
        attention_mask=_mask(inside),
        positions=torch.from_numpy(np.flatnonzero(inside)[before]),
    )


def _pad(
    documents: Sequence[npt.NDArray[np.int64]], pad_token_id: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Padded on the right, int64 [b, t], and where the tokens are, bool [b, t]."""
    lengths = np.array([len(document) for document in documents])
    inside = np.arange(int(lengths.max())) < lengths[:, None]
    ids = np.full(inside.shape, pad_token_id, np.int64)
    ids[inside] = np.concatenate(documents)
    return ids, inside


def _labels(data: Rows, rows: Indices) -> npt.NDArray[np.int64]:
    return np.array([data.label(row) for row in rows.tolist()], np.int64)


def _weights(data: Rows, rows: Indices) -> torch.Tensor | None:
    return None if data.weights is None else torch.from_numpy(data.weights[rows])


def _mask(inside: npt.NDArray[np.bool_]) -> torch.Tensor | None:
    return None if inside.all() else torch.from_numpy(inside.astype(np.int64))
