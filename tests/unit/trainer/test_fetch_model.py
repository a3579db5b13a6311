"""Models from this machine and from real servers (`servers`): which files are taken, and once."""

import pytest
from finetune_api.constants import Reason
from finetune_api.plan import Location, PlanModel
from finetune_trainer.errors import Interrupted, UserError
from finetune_trainer.fetch_model import fetch_model, select_files
from finetune_trainer.telemetry.watch import Watch
from finetune_trainer.workspace import Workspace

from tests.models import save_tiny_bert
from tests.unit.trainer.servers import COMMIT, hub, hub_files, web_server, write_secret


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


def test_a_model_from_s3_is_whole_and_fetched_once(tmp_path, watch, s3, model_folder):
    client, secret = s3
    for file in model_folder.iterdir():
        client.upload_file(str(file), "bucket", f"models/tiny/{file.name}")
    client.put_object(Bucket="bucket", Key="models/tiny/pytorch_model.bin", Body=b"ballast")
    client.put_object(Bucket="bucket", Key="models/tiny/onnx/model.onnx", Body=b"ballast")
    model = PlanModel(location=Location(uri="s3://bucket/models/tiny", secret_dir=secret))
    workspace = Workspace(tmp_path)
    assert fetch_model(model, workspace, watch) is None
    assert {p.name for p in workspace.model.iterdir() if p.name[0] != "."} == {p.name for p in model_folder.iterdir()}
    assert (workspace.model / "config.json").read_bytes() == (model_folder / "config.json").read_bytes()
    before = workspace.model.stat().st_ino
    fetch_model(model, workspace, watch)
    assert workspace.model.stat().st_ino == before
    client.put_object(
        Bucket="bucket", Key="models/tiny/config.json", Body=(model_folder / "config.json").read_bytes() + b"\n"
    )
    fetch_model(model, workspace, watch)
    assert workspace.model.stat().st_ino != before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_from_a_web_server_is_asked_for_file_by_file(tmp_path, watch, model_folder):
    with web_server({f"/m/{p.name}": p.read_bytes() for p in model_folder.iterdir()}) as url:
        fetch_model(PlanModel(location=Location(uri=f"{url}/m")), Workspace(tmp_path), watch)
        with pytest.raises(UserError) as caught:
            fetch_model(PlanModel(location=Location(uri=f"{url}/other")), Workspace(tmp_path), watch)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {p.name for p in (tmp_path / "model").iterdir()}
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_a_hub_model_is_pinned_to_its_commit(tmp_path, watch, model_folder, monkeypatch):
    secret = write_secret(tmp_path / "secret", HF_TOKEN="hf_token")
    model = PlanModel(location=Location(uri="hf://owner/tiny", secret_dir=secret), revision="main")
    workspace = Workspace(tmp_path / "workspace")
    with hub(hub_files(model_folder), monkeypatch) as requests:
        assert fetch_model(model, workspace, watch) == COMMIT
        assert all(request.endswith("Bearer hf_token") for request in requests if "owner/tiny" in request)
        requests.clear()
        assert fetch_model(model, workspace, watch) == COMMIT
        assert requests == []
        names = {p.name for p in workspace.model.iterdir() if p.name[0] != "."}
        assert names == {p.name for p in model_folder.iterdir()}
        assert fetch_model(model.model_copy(update={"trust_remote_code": True}), workspace, watch) == COMMIT
        assert (workspace.model / "code.py").read_bytes() == b"boom()"
    assert [p.name for p in workspace.root.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (PlanModel(location=Location(uri="hf://owner/unknown")), "hf://owner/unknown does not exist"),
        (PlanModel(location=Location(uri="hf://owner/tiny"), revision="missing"), "does not exist"),
        (PlanModel(location=Location(uri="hf://not/a/repository")), "was refused"),
    ],
)
def test_a_hub_model_that_is_not_there_is_named(tmp_path, watch, monkeypatch, model, words):
    with hub({}, monkeypatch), pytest.raises(UserError, match=words) as caught:
        fetch_model(model, Workspace(tmp_path), watch)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_a_stop_ends_a_hub_download(tmp_path, telemetry, watch, model_folder, monkeypatch):
    workspace = Workspace(tmp_path)
    with hub(hub_files(model_folder), monkeypatch):
        telemetry.stop_requested.set()
        with pytest.raises(Interrupted):
            fetch_model(PlanModel(location=Location(uri="hf://owner/tiny")), workspace, watch)
        telemetry.stop_requested.clear()
        assert not workspace.model.exists()
        assert fetch_model(PlanModel(location=Location(uri="hf://owner/tiny")), workspace, watch) == COMMIT


# --- models: which files


SETTINGS = {"config.json", "tokenizer.json", "tokenizer_config.json"}
BALLAST = {"README.md", "model.onnx", "tf_model.h5", "flax_model.msgpack", "consolidated.safetensors", ".gitattributes"}


@pytest.mark.parametrize(
    ("weights", "ballast"),
    [
        ({"model.safetensors"}, {"pytorch_model.bin", "model.safetensors.index.json"}),
        (
            {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
            {"pytorch_model-00001-of-00001.bin"},
        ),
    ],
)
def test_one_set_of_weights_is_chosen(weights, ballast):
    assert set(select_files(SETTINGS | weights | ballast | BALLAST, False, False)) == SETTINGS | weights


def test_code_comes_only_where_it_is_trusted():
    names = SETTINGS | {"model.safetensors", "modeling.py", "lib/layers.py"}
    assert not any(name.endswith(".py") for name in select_files(names, False, False))
    assert set(select_files(names, False, True)) == names


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (SETTINGS | {"pytorch_model.bin"}, "model.allowPickle"),
        (SETTINGS | {"pytorch_model.bin.index.json"}, "model.allowPickle"),
        (SETTINGS, "holds no weights"),
        ({"model.safetensors"}, "holds no config.json"),
        ({"adapter_config.json", "adapter_model.safetensors"}, "is a PEFT adapter"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(names, words):
    with pytest.raises(UserError, match=words) as caught:
        select_files(names, False, False)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_pickles_may_be_allowed():
    names = SETTINGS | {"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"}
    assert set(select_files(names, True, False)) == names


def test_an_interrupted_download_goes_on_where_it_was(tmp_path, telemetry, model_folder):
    class StopAtWeights(Watch):
        def advance(self, done, total):
            if total > 20_000:
                telemetry.stop_requested.set()
            super().advance(done, total)

    model = PlanModel(location=Location(uri="pvc://models/tiny", path=str(model_folder)))
    workspace = Workspace(tmp_path)
    with pytest.raises(Interrupted, match="fetching the model"):
        fetch_model(model, workspace, StopAtWeights(telemetry, "Fetching the model", 0, 1))
    kept = {p.name: p.stat().st_ino for p in tmp_path.glob(".model-download/*/config.json")}
    telemetry.stop_requested.clear()
    fetch_model(model, workspace, Watch(telemetry, "Fetching the model", 0, 1))
    assert kept == {"config.json": (workspace.model / "config.json").stat().st_ino}
    assert (workspace.model / "model.safetensors").read_bytes() == (model_folder / "model.safetensors").read_bytes()


def test_trusted_code_may_lie_in_deep_folders(tmp_path, watch, model_folder, monkeypatch):
    model = PlanModel(location=Location(uri="hf://owner/tiny"), trust_remote_code=True)
    with hub(hub_files(model_folder) | {"lib/deep/layers.py": b"x = 1"}, monkeypatch):
        fetch_model(model, Workspace(tmp_path), watch)
    assert (tmp_path / "model" / "lib" / "deep" / "layers.py").read_bytes() == b"x = 1"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_trouble_with_the_workspace_is_not_the_models(tmp_path, watch, model_folder, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("finetune_trainer.fetch_model.write_file", fail)
    model = PlanModel(location=Location(uri="pvc://models/tiny", path=str(model_folder)))
    with pytest.raises(type(error)):
        fetch_model(model, Workspace(tmp_path), watch)


def test_a_hub_caches_links_are_followed(tmp_path, watch, model_folder):
    (tmp_path / "snapshot").mkdir()
    for file in model_folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    model = PlanModel(location=Location(uri="file://snapshot", path=str(tmp_path / "snapshot")))
    fetch_model(model, Workspace(tmp_path / "w"), watch)
    assert not any(file.is_symlink() for file in (tmp_path / "w" / "model").iterdir())
    assert (tmp_path / "w" / "model" / "model.safetensors").stat().st_size > 1000
