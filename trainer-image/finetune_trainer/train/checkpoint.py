"""Checkpoints: written whole or not at all, proven by hashes before they are trusted.

    checkpoints/step-00000100/   weights.safetensors  training.pt  state.json  manifest.json
    checkpoints/best/            weights.safetensors  best.json

A step folder holds everything that the next step depends on. The manifest is written last. Where the weights are spread
over several processes (`sharding`), the folder `shards` stands for weights.safetensors and the optimizer; any number of
processes goes on from either kind.
"""

import json
import logging
import random
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from finetune_api.base import Document
from finetune_api.constants import Reason
from finetune_api.plan import Plan
from pydantic import ValidationError
from safetensors.torch import save_file

from finetune_trainer.errors import StageError, UserError
from finetune_trainer.model.load import load_trainable_state, trainable_state, whole
from finetune_trainer.train.distributed import ALONE, World
from finetune_trainer.workspace import hash_file, new_folder

logger = logging.getLogger(__name__)

KEEP = 2
"""Newest step folders that are kept: the one before the last is there if the last turns out broken."""

WEIGHTS, TRAINING, STATE, MANIFEST, BEST = (
    "weights.safetensors",
    "training.pt",
    "state.json",
    "manifest.json",
    "best.json",
)


class RunIdentity(Document):
    """What must be the same for a checkpoint to be gone on from."""

    fingerprint: str
    """Of the prepared data."""
    settings: dict[str, Any]
    """Settings by their path in the spec."""


class Improvement(Document):
    """The last evaluation that brought one, for early stopping."""

    step: int
    score: float
    evaluations_since: int = 0


class Best(Document):
    step: int
    score: float


class RunState(Document):
    """Where a run stands after `step` optimizer steps: the batch cursor, and what has been added up."""

    step: int = 0
    evaluated_step: int = 0
    """Step of the last evaluation that was finished."""
    best: Best | None = None
    """So far; the stored one may be of a later step, which an attempt that died had come to."""
    improvement: Improvement | None = None
    """None: no evaluation counted so far, or there is no early stopping."""
    training_loss: float | None = None
    """Mean over the steps between the last two evaluations."""
    evaluation_loss: float | None = None
    loss_sum: float = 0.0
    """Of the targets since the last evaluation."""
    loss_targets: int | float = 0
    """Their number, or the sum of their weights."""
    tokens: int = 0
    rows: int = 0
    seconds: float = 0.0
    """Spent in optimizer steps, over all attempts."""


class _File(Document):
    size: int
    sha256: str


class _StoredBest(Document):
    """best.json."""

    best: Best
    weights: _File


class _Manifest(Document):
    identity: RunIdentity
    files: dict[str, _File]


def identify(plan: Plan, fingerprint: str) -> RunIdentity:
    """The identity of a run: every setting that its weights or its choice of the best checkpoint depend on.

    The size of a micro-batch is none of them (the loss does not depend on it), nor are activations that are computed
    again, nor the device.
    """
    spec = plan.to_dict()
    free = {"activationCheckpointing", "checkpointSteps", "compile", "microBatchTokens", "precision"}
    settings = {f"training.{name}": value for name, value in spec["training"].items() if name not in free}
    settings |= {f"method.lora.{name}": value for name, value in spec.get("lora", {}).items()}
    settings |= {f"method.headFirst.{name}": value for name, value in spec.get("headFirst", {}).items()}
    settings |= {f"method.dpo.{name}": value for name, value in spec.get("dpo", {}).items()}
    settings |= {
        "task": spec["task"],
        "model.uri": spec["model"]["location"]["uri"],
        "model.revision": spec["model"].get("revision"),
        "model.adapter.uri": spec["model"].get("adapter", {}).get("uri"),
        "method.type": spec["method"],
        "method.trainable.lastLayers": spec.get("lastLayers"),
        "evaluation.metrics": spec["evaluation"]["metrics"],
    }
    return RunIdentity(fingerprint=fingerprint, settings=settings)


class Checkpoints:
    """The checkpoints of one run in `folder`."""

    def __init__(self, folder: Path, identity: RunIdentity, world: World = ALONE) -> None:
        self.folder = folder
        self._world = world
        self.best_folder = folder / "best"
        self._identity = identity

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: RunState) -> None:
        """Saves the step, then drops all but the newest `KEEP`: a full disk costs no older checkpoint."""
        world = self._world
        training: dict[str, Any] = {"rng": world.gather(_rng_states())}
        with world.new_folder(self._path(state.step)) as folder:
            own: list[Path] = []
            if world.is_sharded:
                own = _sharding().save_shards(model, optimizer, folder, world)
            elif world.is_main:
                _save_weights(trainable_state(model), folder)
                training["optimizer"] = optimizer.state_dict()
                own = [folder / WEIGHTS]
            if world.is_main:
                torch.save(training, folder / TRAINING)
                (folder / STATE).write_text(state.to_json(), encoding="utf-8")
                own += [folder / TRAINING, folder / STATE]
            described = world.gather({path.relative_to(folder).as_posix(): _describe(path) for path in own})
            if world.is_main:
                files = {name: file for part in described for name, file in part.items()}
                manifest = _Manifest(identity=self._identity, files=files)
                (folder / MANIFEST).write_text(manifest.to_json(indent=2), encoding="utf-8")
        if world.is_main:
            for old in self._steps()[:-KEEP]:
                shutil.rmtree(old)

    def newest(self) -> Path | None:
        """The newest whole checkpoint; broken ones and leftovers of a kill are removed on the way.

        Without one, the best weights are of no known run and go too.
        Raises UserError if it is from a run with other data or settings.
        """
        return self._world.from_main(self._newest)

    def _newest(self) -> Path | None:
        self._clean_up()
        for path in reversed(self._steps()):
            problem, manifest = _verify(path)
            if manifest is None:
                logger.warning("Checkpoint %s is broken (%s): going back to the one before", path.name, problem)
                shutil.rmtree(path)
                continue
            self._check_identity(path, manifest.identity)
            return path
        shutil.rmtree(self.best_folder, ignore_errors=True)
        return None

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> RunState:
        """Puts model, optimizer and all random generators back to where they were; raises StageError if it cannot."""
        training = torch.load(path / TRAINING, map_location="cpu", weights_only=True)
        if "optimizer" not in training:
            _sharding().load_shards(model, optimizer, path, self._world)
        else:
            load_trainable_state(model, path / WEIGHTS)
            if self._world.is_sharded:
                _sharding().load_moments(optimizer, training["optimizer"]["state"])
            else:
                optimizer.load_state_dict(training["optimizer"])
        rng = training["rng"]
        _set_rng_states(rng[self._world.rank % len(rng)])  # of another number of processes: each step draws its own
        return RunState.model_validate_json((path / STATE).read_bytes())

    def save_best(self, model: torch.nn.Module, best: Best) -> None:
        weights = {}
        for name, weight in trainable_state(model).items():  # of a sharded model one is whole at a time
            value = whole(weight)
            if self._world.is_main:
                weights[name] = value.to("cpu")
        self._world.from_main(lambda: self._save_best(weights, best))

    def _save_best(self, weights: dict[str, torch.Tensor], best: Best) -> None:
        with new_folder(self.best_folder) as folder:
            _save_weights(weights, folder)
            stored = _StoredBest(best=best, weights=_describe(folder / WEIGHTS))
            (folder / BEST).write_text(stored.to_json(), encoding="utf-8")

    def best(self) -> Best | None:
        stored = self._world.from_main(lambda: _read_best(self.best_folder))
        return stored.best if stored else None

    def load_best(self, model: torch.nn.Module) -> None:
        """Puts the best weights into `model`; raises StageError if they are not those that were saved."""
        path, stored = self.best_folder / WEIGHTS, _read_best(self.best_folder)
        if stored is None or not path.is_file() or _describe(path) != stored.weights:
            raise StageError(
                Reason.STAGE_FAILED,
                f"{path} is missing or damaged: delete the folder 'checkpoints' in the workspace and train again",
            )
        load_trainable_state(model, path)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _clean_up(self) -> None:
        """A kill in `new_folder` leaves temporary folders; one between its two renames leaves `best` as one."""
        if not self.best_folder.exists():
            whole = [(stored.best.step, path) for path in self.folder.glob(".best.*") if (stored := _read_best(path))]
            if whole:
                min(whole)[1].rename(self.best_folder)  # the older one was surely synced
        for path in self.folder.glob(".*"):
            if path.is_dir():
                shutil.rmtree(path)

    def _check_identity(self, path: Path, found: RunIdentity) -> None:
        changes = [
            f"{name} was {found.settings.get(name)} and is now {self._identity.settings.get(name)}"
            for name in sorted({*found.settings, *self._identity.settings})
            if found.settings.get(name) != self._identity.settings.get(name)
        ]
        if found.fingerprint != self._identity.fingerprint:
            changes.append("the prepared data is not the same")
        if changes:
            raise UserError(
                Reason.INVALID_SPEC,
                f"checkpoint {path.name} in the workspace is from another run: {'; '.join(changes)}. "
                "Use a new workspace, or delete its folder 'checkpoints' to train from the start",
            )


def _save_weights(weights: dict[str, torch.Tensor], folder: Path) -> None:
    save_file({name: weight.to("cpu").contiguous() for name, weight in weights.items()}, folder / WEIGHTS)


def _sharding() -> ModuleType:
    """Imported only where it is needed: torch.distributed.checkpoint takes seconds."""
    from finetune_trainer.train import sharding

    return sharding


def _describe(path: Path) -> _File:
    return _File(size=path.stat().st_size, sha256=hash_file(path))


def _verify(path: Path) -> tuple[str, _Manifest | None]:
    """What is wrong with a step folder, or its manifest if nothing is."""
    try:
        manifest = _Manifest.model_validate_json((path / MANIFEST).read_bytes())
        for name, expected in manifest.files.items():
            if _describe(path / name) != expected:
                return f"{name} is damaged", None
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name}: {error.strerror}", None
    except ValidationError:
        return f"{MANIFEST} is damaged", None
    return "", manifest


def _read_best(folder: Path) -> _StoredBest | None:
    try:
        return _StoredBest.model_validate_json((folder / BEST).read_bytes())
    except (OSError, ValidationError):
        return None


def _rng_states() -> dict[str, Any]:
    """All of them, in types that `torch.load` reads without unpickling code."""
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    inner = dict(numpy_state["state"])
    inner["key"] = inner["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": json.dumps({**numpy_state, "state": inner}),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy_state = json.loads(states["numpy"])
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
