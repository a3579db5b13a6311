"""An adapter of an earlier job -> `adapter/` of the workspace: the files of it that training goes on from."""

from finetune_api.constants import Reason
from finetune_api.plan import Location

from finetune_trainer.errors import UserError
from finetune_trainer.fetch import download
from finetune_trainer.storage import filesystem, storage_errors
from finetune_trainer.telemetry.watch import Watch
from finetune_trainer.workspace import Workspace, new_folder

FIELD = "model.adapter.uri"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_CONFIG = "base_config/config.json"
"""Of a classifier: the labels. Only what we published has it."""


def fetch_adapter(location: Location, workspace: Workspace, watch: Watch) -> None:
    """Puts the adapter into the workspace, whole or not at all; it is small, so every attempt fetches it anew.

    Raises UserError (ModelNotFound, ModelInvalid), StageError for network trouble, Interrupted.
    """
    with storage_errors(location, Reason.MODEL_NOT_FOUND, FIELD), new_folder(workspace.adapter) as folder:
        files, path = filesystem(location)
        root = path.rstrip("/")
        if files.exists(f"{root}/config.json") and not files.exists(f"{root}/{ADAPTER_CONFIG}"):
            raise UserError(
                Reason.MODEL_INVALID, f"{FIELD}: this is a whole model, not a PEFT adapter: give it as model.uri"
            )
        files.info(f"{root}/{ADAPTER_CONFIG}")  # raises what is wrong, where `exists` would only say no
        if not files.exists(f"{root}/{ADAPTER_WEIGHTS}"):
            raise UserError(Reason.MODEL_INVALID, f"{FIELD}: the adapter has no {ADAPTER_WEIGHTS}")
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_CONFIG):
            if name != BASE_CONFIG or files.exists(f"{root}/{name}"):
                download(files, f"{root}/{name}", folder / name, watch)
