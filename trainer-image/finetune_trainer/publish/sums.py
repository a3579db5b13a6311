"""SHA256SUMS: the hashes of an artifact's files, as `sha256sum -c` reads them."""

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from finetune_trainer.workspace import hash_file, write_file

SUMS = "SHA256SUMS"
CARD = "README.md"
TAG = "finetune-operator"
"""A tag in the metadata of every model card of ours."""


def write_sums(folder: Path, check: Callable[[], None] = lambda: None) -> None:
    """Writes `folder`/SHA256SUMS, sorted by name. `check` is called every few MiB, and may raise to stop."""
    lines = [f"{hash_file(folder / name, check)}  {name}\n" for name in artifact_files(folder)]
    write_file(folder / SUMS, "".join(lines))


def artifact_files(folder: Path) -> list[str]:
    """Names of all files but SHA256SUMS, relative to `folder`, sorted."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != SUMS)


def published_names(read: Callable[[str], bytes]) -> set[str]:
    """The files of a model that this project published where `read` gets a file's content by its name.

    None unless the SHA256SUMS proves to be ours, for others write such files too: it has to hold the hash of the
    model card that lies beside it, and that to be one of ours. Raises what `read` raises for a missing file.
    """
    card, sums = read(CARD), read(SUMS).decode(errors="replace")
    proven = f"{hashlib.sha256(card).hexdigest()}  {CARD}" in sums.splitlines()
    ours = proven and f"- {TAG}" in card.decode(errors="replace").splitlines()
    return listed_names(sums) | {SUMS} if ours else set()


def listed_names(sums: str) -> set[str]:
    """The file names in a SHA256SUMS, which may be somebody else's: none that leads out of its folder."""
    names = {line[66:] for line in sums.splitlines() if line[64:66] in ("  ", " *")}
    paths = {name: PurePosixPath(name) for name in names}
    return {name for name, path in paths.items() if name and not path.is_absolute() and ".." not in path.parts}
