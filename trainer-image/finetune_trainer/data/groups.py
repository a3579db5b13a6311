"""Rows that belong together, by their numbers: with equal keys, or joined by pairs. In little memory."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Groups = npt.NDArray[np.int32]
"""For each row the number of the first one of its group."""

Numbers = npt.NDArray[np.int64]

ROWS_AT_ONCE = 1 << 19
"""About as many are sorted, or looked at, at a time: each takes some 50 bytes."""

MOST_PARTS = 256


def blocks(rows: int) -> Iterator[slice]:
    """All rows, some at a time."""
    return (slice(start, min(start + ROWS_AT_ONCE, rows)) for start in range(0, rows, ROWS_AT_ONCE))


def equal_rows(keys: npt.NDArray[np.uint64]) -> Iterator[tuple[Numbers, Numbers, Numbers]]:
    """(First, last, row): each row whose key earlier rows have, after the first and the last of those."""
    parts = min(MOST_PARTS, 1 << (len(keys) // ROWS_AT_ONCE).bit_length())
    part_of = keys.astype(np.uint8) & np.uint8(parts - 1)
    for part in range(parts):
        rows = np.flatnonzero(part_of == part)
        rows = rows[np.argsort(keys[rows], kind="stable")]
        ordered = keys[rows]
        same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        if len(same):
            begins = np.arange(len(rows))
            begins[same] = 0
            yield rows[np.maximum.accumulate(begins)[same]], rows[same - 1], rows[same]


def group_rows(keys: npt.NDArray[np.uint64]) -> Groups:
    """Rows with equal keys are a group."""
    groups = np.arange(len(keys), dtype=np.int32)
    for first, _, rows in equal_rows(keys):
        groups[rows] = first
    return groups


def is_first(groups: Groups) -> npt.NDArray[np.bool_]:
    """Which rows are the first of their groups: [rows]."""
    first: npt.NDArray[np.bool_] = groups == np.arange(len(groups), dtype=np.int32)
    return first


def join(groups: Groups, earlier: Numbers, later: Numbers) -> None:
    """Makes the groups of each pair one. Until `flatten`, a row's number may be that of another row on the way to the
    first one, which `find_groups` tells.
    """
    while True:
        one, other = find_groups(groups, earlier), find_groups(groups, later)
        apart = one != other
        if not apart.any():
            return
        np.minimum.at(groups, np.maximum(one, other)[apart], np.minimum(one, other)[apart])


def find_groups(groups: Groups, rows: Numbers | slice) -> Groups:
    """The first rows of the groups of some rows; shortens the ways to them."""
    found = groups[rows]
    while not np.array_equal(further := groups[found], found):
        found = further
    groups[rows] = found
    return found


def flatten(groups: Groups) -> None:
    """After the last `join`."""
    for some in blocks(len(groups)):
        find_groups(groups, some)
