"""The foundation model -> `model/` of the workspace: whole or not at all, and only the files that are needed."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetune_api.base import Document
from finetune_api.constants import Reason
from finetune_api.plan import PlanModel
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import tqdm as hub_tqdm
from pydantic import ValidationError

from finetune_trainer.errors import UserError
from finetune_trainer.fetch import download, list_files, remove_folder
from finetune_trainer.storage import display_uri, filesystem, hf_token, scheme, storage_errors
from finetune_trainer.telemetry.watch import Watch
from finetune_trainer.workspace import Workspace, new_folder, write_file

FIELD = "model.uri"
MARKER = ".fetched.json"
STAGING = ".model-download"
CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin")
SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
SETTINGS = re.compile(r"[^/]+\.(json|txt|model|jinja|tiktoken)|additional_chat_templates/[^/]+\.jinja")
"""Configuration and tokenizer."""
BYTES_BAR = "huggingface_hub.snapshot_download"
"""Name of the hub's progress bar of what is on the disk."""
ADAPTER = "adapter_config.json"

VERSION_FACTS = ("size", "mtime", "ETag", "etag", "LastModified", "last_modified", "md5Hash", "content_md5", "updated")
"""By these a filesystem tells that a file is another one than before."""

FILES_BY_HTTP = (
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", WEIGHTS, INDEX, PICKLE, PICKLE_INDEX),
)
"""https has no listing: these names are asked for."""


class _Fetched(Document):
    """What lies in `model/`, so that it need not be fetched twice."""

    uri: str
    revision: str | None = None
    trust_remote_code: bool
    allow_pickle: bool
    version: str
    """Commit of a hub model, else a hash of the names, sizes and times of the files."""


class _Download(NamedTuple):
    """What is gathered in `staging`; None if it is in its place already."""

    version: str
    names: list[str]
    staging: Path | None = None


def fetch_model(model: PlanModel, workspace: Workspace, watch: Watch, *, weights: bool = True) -> str | None:
    """Puts the model into the workspace, unless it is there, and returns its commit if it is from a hub.

    A branch or tag is resolved once: a later attempt of the same job finds the same commit.
    Without `weights`, a model must have some, but they are left where they are.
    Raises UserError (ModelNotFound, ModelInvalid), StageError for network trouble, Interrupted.
    """
    on_hub = scheme(model.location) == "hf"
    fetch = _from_hub if on_hub else _from_storage
    with storage_errors(model.location, Reason.MODEL_NOT_FOUND, FIELD):
        fetched = fetch(model, workspace, watch, weights)
    if fetched.staging is not None:
        _put_in_place(fetched.staging, fetched.names, workspace, _marker(model, fetched.version))
    return fetched.version if on_hub else None


def select_files(names: Collection[str], allow_pickle: bool, trust_remote_code: bool) -> list[str]:
    """The files of a model folder that are needed, sorted: settings, tokenizer, one set of weights, trusted code.

    Raises UserError (ModelInvalid) if there is no config, or no weights that may be read.
    """
    if CONFIG not in names and ADAPTER in names:
        raise _invalid("is a PEFT adapter, not a whole model: merge it into its model first")
    if CONFIG not in names:
        raise _invalid(f"holds no {CONFIG}: give the folder of a model in Hugging Face layout")
    selected = {name for name in names if SETTINGS.fullmatch(name)} - {ADAPTER, INDEX, PICKLE_INDEX}
    if trust_remote_code:
        selected |= {name for name in names if name.endswith(".py") and ".." not in name}
    return sorted(selected | _select_weights(names, allow_pickle))


def _select(names: Collection[str], model: PlanModel, weights: bool) -> list[str]:
    selected = select_files(names, model.allow_pickle, model.trust_remote_code)
    return (
        selected
        if weights
        else [name for name in selected if name not in (INDEX, PICKLE_INDEX) and not name.endswith(WEIGHT_SUFFIXES)]
    )


def _select_weights(names: Collection[str], allow_pickle: bool) -> set[str]:
    """In transformers' order of preference; other copies of the weights in the folder would only be ballast."""
    kinds = [(WEIGHTS, INDEX, ".safetensors"), (PICKLE, PICKLE_INDEX, ".bin")]
    for single, index, suffix in kinds[: 2 if allow_pickle else 1]:
        if single in names:
            return {single}
        if index in names:
            return {index, *(name for name in names if SHARD.fullmatch(name) and name.endswith(suffix))}
    if PICKLE in names or PICKLE_INDEX in names:
        raise _invalid(
            "has its weights only as pickle files, which can run code when they are read: use a revision with "
            "safetensors, or set model.allowPickle if you trust it"
        )
    raise _invalid(f"holds no weights ({WEIGHTS} or {INDEX})")


def _invalid(what: str) -> UserError:
    return UserError(Reason.MODEL_INVALID, f"{FIELD}: the model {what}")


def _from_hub(model: PlanModel, workspace: Workspace, watch: Watch, weights: bool) -> _Download:
    present = _present(model, workspace)
    if present is not None:
        return _Download(present.version, [])
    owner_and_name = model.location.uri.removeprefix("hf://").strip("/")
    token = hf_token(model.location)
    info = HfApi(token=token).model_info(owner_and_name, revision=model.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = _select(sizes, model, weights)
    commit = str(info.sha)
    staging = _staging(workspace, model, commit, names)
    snapshot_download(
        owner_and_name,
        revision=commit,
        local_dir=staging,
        token=token,
        allow_patterns=names,
        tqdm_class=_watched_bar(watch, sum(sizes[name] for name in names)),
    )
    return _Download(commit, names, staging)


def _watched_bar(watch: Watch, total: int) -> type[Any]:
    """A progress bar of the hub's that tells the watch, and so ends the download when a stop is requested."""
    done = 0

    class Bar(hub_tqdm):  # type: ignore[misc]  # huggingface_hub is not followed by mypy
        def __init__(self, *args: Any, **settings: Any) -> None:
            self._counts_bytes = settings.get("name") == BYTES_BAR
            super().__init__(*args, **settings)

        def update(self, n: float | None = 1) -> Any:
            nonlocal done
            if self._counts_bytes:
                done += int(n or 0)
            watch.advance(done, total)
            return super().update(n)

    return Bar


def _from_storage(model: PlanModel, workspace: Workspace, watch: Watch, weights: bool) -> _Download:
    files, path = filesystem(model.location)
    listing = _probe(files, path) if scheme(model.location) in ("http", "https") else list_files(files, path, 2)
    if not listing:
        raise FileNotFoundError(path)
    names = _select(listing, model, weights)
    version = _digest([name, *(str(listing[name].get(fact)) for fact in VERSION_FACTS)] for name in names)
    present = _present(model, workspace)
    if present is not None and present.version == version:
        return _Download(version, [])
    staging = _staging(workspace, model, version, names)
    for name in names:
        download(files, f"{path.rstrip('/')}/{name}", staging / name, watch)
    return _Download(version, names, staging)


def _probe(files: Any, path: str) -> dict[str, dict[str, Any]]:
    """The well-known files that an https server has, and the shards that its index names."""
    root = path.rstrip("/")
    files.info(f"{root}/{CONFIG}")  # raises what is wrong, where `exists` would only say no
    names = [name for name in FILES_BY_HTTP if files.exists(f"{root}/{name}")]
    for index in {INDEX, PICKLE_INDEX} & set(names):
        names += set(json.loads(files.cat_file(f"{root}/{index}"))["weight_map"].values())
    return {name: files.info(f"{root}/{name}") for name in names}


def _marker(model: PlanModel, version: str) -> _Fetched:
    return _Fetched(
        uri=display_uri(model.location),
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        allow_pickle=model.allow_pickle,
        version=version,
    )


def _present(model: PlanModel, workspace: Workspace) -> _Fetched | None:
    """The marker of the model in the workspace, if it is the one that is wanted."""
    try:
        found = _Fetched.model_validate_json((workspace.model / MARKER).read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found == _marker(model, found.version) else None


def _staging(workspace: Workspace, model: PlanModel, version: str, names: list[str]) -> Path:
    """Where this very download is gathered; what an interrupted attempt left there is used, others' is removed."""
    root = workspace.root / STAGING
    folder = root / _digest([[display_uri(model.location), version, names]])[:16]
    for other in root.glob("*"):
        if other != folder:
            remove_folder(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _put_in_place(staging: Path, names: list[str], workspace: Workspace, marker: _Fetched) -> None:
    with new_folder(workspace.model) as folder:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).rename(folder / name)
        write_file(folder / MARKER, marker.to_json())
    remove_folder(staging.parent)


def _digest(parts: Iterable[list[Any]]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
