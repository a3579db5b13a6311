"""SHA256SUMS: the hashes of an artifact's files, as `sha256sum -c` reads them."""

import hashlib
from pathlib import Path, PurePosixPath

from finetune_trainer.workspace import write_file

SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Writes `folder`/SHA256SUMS, sorted by name."""
    lines = []
    for name in artifact_files(folder):
        with (folder / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    write_file(folder / SUMS, "".join(lines))


def artifact_files(folder: Path) -> list[str]:
    """Names of all files but SHA256SUMS, relative to `folder`, sorted."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name != SUMS)


def listed_names(sums: str) -> set[str]:
    """The file names in a SHA256SUMS, which may be somebody else's: none that leads out of its folder."""
    names = {line[66:] for line in sums.splitlines() if line[64:66] in ("  ", " *")}
    paths = {name: PurePosixPath(name) for name in names}
    return {name for name, path in paths.items() if name and not path.is_absolute() and ".." not in path.parts}
