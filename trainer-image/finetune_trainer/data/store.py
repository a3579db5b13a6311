"""Tokenized splits as Arrow IPC files: written as a stream, read as a memory map.

    data/manifest.json
    data/<split>/00000.arrow ...

One file holds about `ROWS_PER_SHARD` rows in record batches of `ROWS_PER_BATCH`, or fewer if they are long. A
preference pair is two rows here, the better answer and then the worse one; the manifest counts pairs. A split has
weights only if some of its rows count less than others.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from finetune_api.base import Document
from finetune_api.constants import Reason
from finetune_api.spec import Task
from pydantic import ValidationError

from finetune_trainer.errors import StageError
from finetune_trainer.workspace import write_file

MANIFEST = "manifest.json"
ROWS_PER_SHARD = 100_000
ROWS_PER_BATCH = 1_000
TOKENS_PER_BATCH = 1 << 20
"""A record batch ends with the row that reaches it: so much is kept in memory."""

_INPUT_IDS = pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False)
_LOSS_MASK = pa.field("loss_mask", pa.list_(pa.field("item", pa.bool_(), nullable=False)), nullable=False)
_LABEL = pa.field("label", pa.int32(), nullable=False)
_WEIGHT = pa.field("weight", pa.float32(), nullable=False)
SCHEMAS = {
    Task.CLASSIFICATION: pa.schema([_INPUT_IDS, _LABEL]),
    Task.GENERATION: pa.schema([_INPUT_IDS, _LOSS_MASK]),
}


class SplitManifest(Document):
    rows: int
    tokens: int
    supervised_tokens: int
    """Tokens that have a loss; for Classification the number of rows."""
    truncated_rows: int


class DataManifest(Document):
    task: Task
    labels: list[str] | None = None
    """In the order of the class ids; None for Generation."""
    max_length: int
    fingerprint: str
    splits: dict[str, SplitManifest]


class TokenizedRow(NamedTuple):
    """One row as training sees it: `loss_mask` for Generation, `label` (class id) for Classification."""

    input_ids: Sequence[int] | npt.NDArray[np.int32]
    loss_mask: Sequence[bool] | npt.NDArray[np.bool_] | None = None
    label: int | None = None
    truncated: bool = False
    weight: float = 1.0
    """How much its loss counts in training (Classification)."""
    rejected: "TokenizedRow | None" = None
    """The worse answer of a preference pair, whose better one this is."""

    @property
    def documents(self) -> "tuple[TokenizedRow, ...]":
        """What the store holds of it, one behind the other: itself, and the worse answer if it is a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)


class SplitWriter:
    """Writes rows, one by one, to the shards of a split. Use as a context manager; then read `manifest`.

    weighted: whether some rows count less than others.
    """

    def __init__(
        self, folder: Path, task: Task, rows_per_shard: int = ROWS_PER_SHARD, *, weighted: bool = False
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._schema = SCHEMAS[task].append(_WEIGHT) if weighted else SCHEMAS[task]
        self._rows_per_shard = rows_per_shard
        self._buffer: list[TokenizedRow] = []
        self._writer: Any = None
        self._shards = 0
        self._rows_in_shard = self._tokens_in_buffer = 0
        self._rows = self._tokens = self._supervised = self._truncated = 0

    def write(self, row: TokenizedRow) -> None:
        for document in row.documents:
            self._add(document)
        self._rows += 1
        self._truncated += any(document.truncated for document in row.documents)
        shard_is_full = self._rows_in_shard + len(self._buffer) >= self._rows_per_shard
        if shard_is_full or len(self._buffer) >= ROWS_PER_BATCH or self._tokens_in_buffer >= TOKENS_PER_BATCH:
            self._flush()
        if shard_is_full:
            self._close_shard()

    def _add(self, document: TokenizedRow) -> None:
        ids = np.asarray(document.input_ids, np.int32)  # a list takes ten times as much
        mask = None if document.loss_mask is None else np.asarray(document.loss_mask, np.bool_)
        self._buffer.append(document._replace(input_ids=ids, loss_mask=mask))
        self._tokens += len(ids)
        self._tokens_in_buffer += len(ids)
        self._supervised += 1 if mask is None else int(np.count_nonzero(mask))

    @property
    def manifest(self) -> SplitManifest:
        return SplitManifest(
            rows=self._rows,
            tokens=self._tokens,
            supervised_tokens=self._supervised,
            truncated_rows=self._truncated,
        )

    def close(self) -> None:
        self._flush()
        self._close_shard()

    def _flush(self) -> None:
        if not self._buffer:
            return
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self._folder / f"{self._shards:05d}.arrow"), self._schema)
            self._shards += 1
        columns = [
            pa.array([getattr(row, field.name) for row in self._buffer], type=field.type) for field in self._schema
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._rows_in_shard += len(self._buffer)
        self._buffer.clear()
        self._tokens_in_buffer = 0

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._rows_in_shard = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_shard()


def write_split(
    folder: Path,
    rows: Iterable[TokenizedRow],
    task: Task,
    rows_per_shard: int = ROWS_PER_SHARD,
    *,
    weighted: bool = False,
) -> SplitManifest:
    """Writes all rows to `folder` (data/<split>) and returns their counts."""
    with SplitWriter(folder, task, rows_per_shard, weighted=weighted) as writer:
        for row in rows:
            writer.write(row)
    return writer.manifest


class _Batch(NamedTuple):
    """The memory-mapped buffers of one record batch; `offsets` are int32 [rows + 1]."""

    offsets: npt.NDArray[np.int32]
    input_ids: npt.NDArray[np.int32]
    loss_mask: Any  # pyarrow BooleanArray: bit-packed, so numpy cannot view it
    labels: npt.NDArray[np.int32] | None
    weights: npt.NDArray[np.float32] | None


class Rows:
    """One split, memory-mapped. A row is one document, or the two of a preference pair (`paired`)."""

    def __init__(self, batches: list[_Batch], paired: bool = False) -> None:
        self._batches = batches
        self._starts = np.cumsum([0] + [len(batch.offsets) - 1 for batch in batches])
        self._per_row = 2 if paired else 1
        counts = [np.diff(batch.offsets) for batch in batches]
        documents = np.concatenate([np.zeros(0, np.int32), *counts]).reshape(-1, self._per_row)
        self.lengths: npt.NDArray[np.int32] = documents.sum(axis=1, dtype=np.int32)
        """Tokens per row, int32 [rows]."""
        self.padded_lengths: npt.NDArray[np.int32] = documents.max(axis=1, initial=0) * np.int32(self._per_row)
        """Tokens per row if its documents are padded to the same length, int32 [rows]."""
        weights = [batch.weights for batch in batches if batch.weights is not None]
        self.weights: npt.NDArray[np.float32] | None = np.concatenate(weights) if weights else None
        """How much the loss of each row counts, float32 [rows]; None: all the same (Classification)."""
        self.reference: npt.NDArray[np.float32] | None = None
        """What the start model thinks of each pair, see `train.preference`: [rows, 2]."""
        self.features: npt.NDArray[np.float32] | None = None
        """What a frozen encoder says of each row, [rows, width], where it was computed before (method Head)."""

    def __len__(self) -> int:
        return len(self.lengths)

    def documents(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of the rows' documents; of a pair the better answer, then the worse one."""
        found: npt.NDArray[np.int64] = (rows[:, None] * self._per_row + np.arange(self._per_row)).ravel()
        return found

    def input_ids(self, document: int) -> npt.NDArray[np.int64]:
        """Token ids, int64 [length]."""
        batch, _, start, stop = self._find(document)
        return batch.input_ids[start:stop].astype(np.int64)

    def loss_mask(self, document: int) -> npt.NDArray[np.bool_]:
        """True where the token is supervised, bool [length]. Generation only."""
        batch, _, start, stop = self._find(document)
        mask: npt.NDArray[np.bool_] = batch.loss_mask[start:stop].to_numpy(zero_copy_only=False)
        return mask.astype(np.bool_)

    def label(self, row: int) -> int:
        """Class id. Classification only."""
        batch, index, _, _ = self._find(row)
        if batch.labels is None:
            raise TypeError("rows of task Generation have no labels")
        return int(batch.labels[index])

    def _find(self, document: int) -> tuple[_Batch, int, int, int]:
        if not 0 <= document < self._starts[-1]:
            raise IndexError(f"document {document} of {self._starts[-1]}")
        number = int(np.searchsorted(self._starts, document, side="right")) - 1
        batch, index = self._batches[number], document - int(self._starts[number])
        return batch, index, int(batch.offsets[index]), int(batch.offsets[index + 1])


def _map_batch(batch: Any) -> _Batch:
    ids = batch.column("input_ids")
    names = batch.schema.names
    return _Batch(
        offsets=ids.offsets.to_numpy(),
        input_ids=ids.values.to_numpy(),
        loss_mask=batch.column("loss_mask").values if "loss_mask" in names else None,
        labels=batch.column("label").to_numpy() if "label" in names else None,
        weights=batch.column("weight").to_numpy() if "weight" in names else None,
    )


def open_split(data: Path, split: str, paired: bool = False) -> Rows:
    """Maps data/<split>, which holds preference pairs if it is `paired`.

    Raises StageError if it was never written or is damaged.
    """
    folder = data / split
    if not folder.is_dir():
        raise StageError(Reason.STAGE_FAILED, f"the prepared data has no split '{split}'; run prepare again")
    batches = []
    for shard in sorted(folder.glob("*.arrow")):
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(shard)))
            batches += [_map_batch(reader.get_batch(i)) for i in range(reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            raise StageError(
                Reason.STAGE_FAILED, f"the prepared data is damaged ({split}/{shard.name}); run prepare again"
            ) from error
    return Rows(batches, paired)


def write_manifest(data: Path, manifest: DataManifest) -> None:
    write_file(data / MANIFEST, manifest.to_json(indent=2))


def read_manifest(data: Path) -> DataManifest:
    """The manifest of the prepared data; raises StageError if there is none that can be read."""
    try:
        return DataManifest.model_validate_json((data / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise StageError(Reason.STAGE_FAILED, f"there is no prepared data ({MANIFEST}); run prepare first") from error
