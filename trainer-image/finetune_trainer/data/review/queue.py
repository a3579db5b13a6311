"""report/review.jsonl: rows whose label somebody should look at, the most suspicious first, each text once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
from finetune_api.report import ReviewRow, Suspicion

from finetune_trainer.data.examples import LabelledText
from finetune_trainer.data.pipeline import Rows
from finetune_trainer.data.review.confident import Mask
from finetune_trainer.data.split import row_hash
from finetune_trainer.workspace import write_file


@dataclass(frozen=True)
class Queue:
    """The rows of which `seen` tells (see `suspicion.SEEN`); conflicting: their text has other labels, too, [rows]."""

    rows: Rows
    seen: npt.NDArray[Any]
    conflicting: Mask

    def rank(self, most: int) -> npt.NDArray[np.int64]:
        """Places in `seen` of the rows to show: by margin, of each text the most suspicious row, at most so many."""
        order = np.argsort(self.seen["margin"], kind="stable")
        _, first = np.unique(self.rows.ledger.input_keys[self.seen["number"][order]], return_index=True)
        ranked: npt.NDArray[np.int64] = order[np.sort(first)][:most]
        return ranked

    def write(self, path: Path, most: int, check: Callable[[], None]) -> int:
        """Returns how many rows it shows. `check` is called for every row, and may raise to stop."""
        ranked = self.rank(most)
        with TemporaryFile(dir=path.parent) as scratch:  # rows come in the order of the spool; texts may be long
            places: dict[int, tuple[int, int]] = {}
            for place, line in self._lines(np.sort(ranked)):
                check()
                places[place] = (scratch.tell(), len(line))
                scratch.write(line)

            def in_order() -> Iterator[bytes]:
                for place in ranked.tolist():
                    start, length = places[place]
                    scratch.seek(start)
                    yield scratch.read(length)

            write_file(path, in_order())
        return len(ranked)

    def _lines(self, places: npt.NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
        """(Place in `seen`, line of the file), in the order of the rows."""
        ledger = self.rows.ledger
        numbers = self.seen["number"][places].tolist()
        for place, number, example in zip(places.tolist(), numbers, self.rows.spool.pick(numbers), strict=True):
            if not isinstance(example, LabelledText):
                raise TypeError("only labelled texts are reviewed")
            seen = self.seen[place]
            file, line = self.rows.spool.locate(number)
            row = ReviewRow(
                row_hash=row_hash(example.text).hex(),
                uri=self.rows.files[file][1].uri,
                line=line,
                text=example.text,
                label=example.label,
                suggested=ledger.label_names[seen["suggested"]],
                confidence=round(float(seen["confidence"]), 4),
                reasons=self._reasons(number, bool(seen["wrong"])),
            )
            yield place, row.to_json().encode() + b"\n"

    def _reasons(self, number: int, wrong: bool) -> list[Suspicion]:
        reasons = {Suspicion.LIKELY_WRONG: wrong, Suspicion.CONFLICTING_LABELS: bool(self.conflicting[number])}
        return [reason for reason, holds in reasons.items() if holds]
