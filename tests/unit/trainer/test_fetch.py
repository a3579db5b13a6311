"""Data and models from real servers: an S3 server, an HTTP server and a small model hub, each in a thread."""

import base64
import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import boto3
import pytest
from finetune_api.constants import Reason, Stage
from finetune_api.plan import JobReference, Location, PlanModel, PlanSource
from finetune_trainer.errors import Interrupted, StageError, UserError
from finetune_trainer.failure import format_trace
from finetune_trainer.fetch import fetch_source
from finetune_trainer.fetch_model import fetch_model, select_files
from finetune_trainer.storage import display_uri, filesystem, storage_errors, storage_options
from finetune_trainer.telemetry import Telemetry
from finetune_trainer.telemetry.watch import Watch
from finetune_trainer.workspace import Workspace

from tests.models import save_tiny_bert
from tests.s3_server import s3_server

COMMIT = "c" * 40


@pytest.fixture
def telemetry():
    return Telemetry(Stage.PREPARE, JobReference(namespace="n", name="j", uid="u"))


@pytest.fixture
def watch(telemetry):
    return Watch(telemetry, "Fetching data", 0, 1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "bert")


def write_secret(folder: Path, **keys: str) -> str:
    folder.mkdir(exist_ok=True)
    for name, value in keys.items():
        (folder / name).write_text(value + "\n")  # as `kubectl create secret --from-file` often leaves it
    return str(folder)


def source(uri: str, **location: str) -> PlanSource:
    return PlanSource.model_validate({"location": {"uri": uri, **location}, "field": "dataset.sources[0]"})


# --- files of this machine


def test_mounted_files_are_read_in_place(tmp_path, watch):
    file = tmp_path / "mnt" / "train.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    (found,) = fetch_source(source("configmap://data/train.jsonl", path=str(file)), tmp_path / "down", watch).files
    assert (found.path, found.name, found.uri) == (file, "train.jsonl", "configmap://data/train.jsonl")
    assert found.at(7) == "dataset.sources[0]: train.jsonl line 7"
    assert not (tmp_path / "down").exists()


def test_a_folder_is_all_its_data_files_by_name(tmp_path, watch):
    for name in ("b.jsonl", "a.csv", "sub/c.parquet", "d.jsonl.gz", "README.md", ".hidden.jsonl", "_tmp/x.csv"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("x")
    found = fetch_source(source("pvc://claim/data", path=str(tmp_path / "data")), tmp_path, watch).files
    assert [f.uri for f in found] == [
        "pvc://claim/data/a.csv",
        "pvc://claim/data/b.jsonl",
        "pvc://claim/data/d.jsonl.gz",
        "pvc://claim/data/sub/c.parquet",
    ]
    assert all(f.path.is_file() for f in found)


def test_a_pattern_is_all_files_that_fit_it(tmp_path, watch):
    """What is named is data whatever its name, but for what is hidden; a name that exists is no pattern."""
    for name in ("b/part-1", "b/part-0", "b/.part-0", "a/part-7", "c/part-3/x", "b/other", "q[1].jsonl", "q1.jsonl"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("x")

    def fetch(pattern: str):
        found = fetch_source(source(f"pvc://claim/data/{pattern}", path=f"{tmp_path}/data/{pattern}"), tmp_path, watch)
        assert all(file.path.read_text() == "x" for file in found.files)
        return [file.uri.removeprefix("pvc://claim/data/") for file in found.files], found.ignored

    assert fetch("*/*part-*") == (["a/part-7", "b/part-0", "b/part-1"], ["pvc://claim/data/b/.part-0"])
    assert fetch("b/part-[0-5]") == (["b/part-0", "b/part-1"], [])
    assert fetch("**/x") == (["c/part-3/x"], [])
    assert fetch("q[1].jsonl") == (["q[1].jsonl"], [])
    assert fetch("q?.jsonl") == (["q1.jsonl"], [])


@pytest.mark.parametrize(("pattern", "words"), [("*.csv", "fits no file"), ("**.csv", "is no pattern")])
def test_a_pattern_that_fits_nothing_is_told_of(tmp_path, watch, pattern, words):
    with pytest.raises(UserError) as caught:
        fetch_source(source(f"pvc://claim/{pattern}", path=f"{tmp_path}/{pattern}"), tmp_path, watch)
    assert caught.value.reason is Reason.DATA_NOT_FOUND
    assert f"dataset.sources[0]: pvc://claim/{pattern} {words}" in caught.value.message


@pytest.mark.parametrize(
    "uri", ["pvc://claim/data", "pvc://claim/data/*", "pvc://claim/data/b.jsonl", "pvc://claim/link"]
)
def test_a_link_may_not_lead_out_of_its_volume(tmp_path, watch, uri):
    """Another user of the volume could have the pod read what only it can."""
    mount = tmp_path / "sources" / "claim"
    (mount / "data").mkdir(parents=True)
    (mount / "old.jsonl").write_text("x")
    (tmp_path / "secret.jsonl").write_text("x")
    (mount / "data" / "a.jsonl").symlink_to(mount / "old.jsonl")
    (mount / "link").symlink_to(mount / "data")
    this = source(uri, path=str(mount / uri.removeprefix("pvc://claim/")))
    (mount / "data" / "b.jsonl").symlink_to(mount / "old.jsonl")
    fetch_source(this, tmp_path, watch)  # links inside are no harm
    (mount / "data" / "b.jsonl").unlink()
    (mount / "data" / "b.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(UserError, match=r"dataset\.sources\[0\]: .* leads out of its volume: b\.jsonl") as caught:
        fetch_source(this, tmp_path, watch)
    assert caught.value.reason is Reason.DATA_INVALID


def test_a_configmap_is_links_and_they_are_followed(tmp_path, watch):
    (tmp_path / "map" / "..2026").mkdir(parents=True)
    (tmp_path / "map" / "..2026" / "a.jsonl").write_text("x")
    (tmp_path / "map" / "..data").symlink_to("..2026")
    (tmp_path / "map" / "a.jsonl").symlink_to("..data/a.jsonl")
    (found,) = fetch_source(source("configmap://m/a.jsonl", path=f"{tmp_path}/map/a.jsonl"), tmp_path, watch).files
    assert found.path.read_text() == "x"


@pytest.mark.parametrize("name", ["nowhere.csv", "empty"])
def test_what_is_not_there_is_named(tmp_path, watch, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        fetch_source(source(f"pvc://claim/{name}", path=str(tmp_path / name)), tmp_path, watch)
    assert caught.value.reason is Reason.DATA_NOT_FOUND
    assert "dataset.sources[0]" in caught.value.message
    assert f"pvc://claim/{name}" in caught.value.message


# --- S3


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """An S3 server with a bucket, and the folder of a Secret for it."""
    with s3_server() as url:
        keys = {
            "AWS_ACCESS_KEY_ID": "key-of-the-test",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_ENDPOINT_URL": url,
            "AWS_REGION": "us-east-1",
        }
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
            region_name=keys["AWS_REGION"],
        )
        client.create_bucket(Bucket="bucket")
        yield client, write_secret(tmp_path_factory.mktemp("secret") / "s3", **keys)


def test_an_object_and_a_prefix_of_s3_are_downloaded(tmp_path, watch, s3, caplog):
    client, secret = s3
    content = b'{"text": "a"}\n' * 50_000
    client.put_object(Bucket="bucket", Key="data/train.jsonl", Body=content)
    client.put_object(Bucket="bucket", Key="data/more/b.csv", Body=b"a,b\n")
    with caplog.at_level(logging.DEBUG):
        (one,) = fetch_source(source("s3://bucket/data/train.jsonl", secret_dir=secret), tmp_path / "one", watch).files
        two = fetch_source(source("s3://bucket/data", secret_dir=secret), tmp_path / "two", watch).files
    assert one.path.read_bytes() == content
    assert [f.uri for f in two] == ["s3://bucket/data/more/b.csv", "s3://bucket/data/train.jsonl"]
    assert [f.path.stat().st_size for f in two] == [4, len(content)]
    ours = "".join(r.getMessage() for r in caplog.records if r.name.startswith("finetune"))
    assert "of-the-test" not in ours


def test_a_pattern_of_s3_and_names_that_are_no_files_here(tmp_path, watch, s3):
    client, secret = s3
    for key in (
        "glob/a.csv",
        "glob/sub/b.csv",
        "glob/sub//b.csv",
        "glob/c.txt",
        "glob/.d.csv",
        f"glob/sub/{'long' * 70}.csv",
    ):
        client.put_object(Bucket="bucket", Key=key, Body=key.encode())
    found = fetch_source(source("s3://bucket/glob/**/*.csv", secret_dir=secret), tmp_path / "down", watch)
    keys = {file.uri.removeprefix("s3://bucket/"): file.path.read_text() for file in found.files}
    assert {"glob/a.csv", "glob/sub/b.csv", f"glob/sub/{'long' * 70}.csv"} <= {*keys}
    assert all(text == key for key, text in keys.items())
    assert found.ignored == ["s3://bucket/glob/.d.csv"]


def test_a_name_that_leads_out_of_its_folder_is_fatal(tmp_path, watch, s3):
    client, secret = s3
    client.put_object(Bucket="bucket", Key="escape/../../x.jsonl", Body=b"{}")
    with pytest.raises(UserError, match="leads out of its folder") as caught:
        fetch_source(source("s3://bucket/escape", secret_dir=secret), tmp_path / "down", watch)
    assert caught.value.reason is Reason.DATA_INVALID
    assert not list(tmp_path.rglob("x.jsonl"))


@pytest.mark.parametrize("uri", ["s3://bucket/nowhere.jsonl", "s3://no-such-bucket/train.jsonl"])
def test_a_missing_object_is_the_users_error(tmp_path, watch, s3, uri):
    with pytest.raises(UserError, match="does not exist") as caught:
        fetch_source(source(uri, secret_dir=s3[1]), tmp_path, watch)
    assert caught.value.reason is Reason.DATA_NOT_FOUND
    assert uri in caught.value.message


def test_a_server_that_is_away_is_tried_again(tmp_path, watch):
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    secret = write_secret(tmp_path / "secret", **keys)
    location = Location(uri="s3://bucket/a.csv", secret_dir=secret)
    with pytest.raises(StageError, match="tried again") as caught, storage_errors(location, Reason.DATA_NOT_FOUND, "f"):
        files, path = filesystem(location)
        files.config_kwargs["retries"] = {"max_attempts": 0}
        files.retries = 1
        files.info(path)
    assert caught.value.exit_code == 1
    assert "f: s3://bucket/a.csv" in caught.value.message


def test_a_folder_can_be_written_to_s3_and_read_back(tmp_path, s3):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "SHA256SUMS").write_text("x")
    location = Location(uri="s3://bucket/out/run-1", secret_dir=s3[1])
    files, path = filesystem(location)
    files.put(str(tmp_path / "artifacts"), path, recursive=True)
    assert filesystem(location)[0].cat_file(f"{path}/SHA256SUMS") == b"x"


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


# --- https


@contextmanager
def web_server(files: dict[str, bytes], authorization: str | None = None, status: int | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            code = status or (401 if authorization and self.headers["Authorization"] != authorization else 200)
            code = 404 if code == 200 and path not in files else code
            body = files[path] if code == 200 else b"no"
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_https_with_a_password_and_a_signed_address(tmp_path, watch):
    secret = write_secret(tmp_path / "secret", username="me", password="pässword")
    header = "Basic " + base64.b64encode("me:pässword".encode()).decode()
    with web_server({"/data/train.csv": b"a,b\n"}, authorization=header) as url:
        uri = f"{url}/data/train.csv?signature=s3cret"
        (found,) = fetch_source(source(uri, secret_dir=secret), tmp_path / "down", watch).files
        assert found.path.read_bytes() == b"a,b\n"
        assert found.uri == f"{url}/data/train.csv"
        with pytest.raises(UserError, match="may not be used: name a Secret with username, password") as caught:
            fetch_source(source(uri), tmp_path / "other", watch)
    assert "s3cret" not in caught.value.message


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (404, UserError, "does not exist"),
        (403, UserError, "may not be used"),
        (400, UserError, r"refused by the server \(HTTP 400\)"),
        (429, StageError, "tried again"),
        (503, StageError, r"could not be reached \(HTTP 503\)"),
    ],
)
def test_the_servers_answer_decides_whether_it_is_tried_again(tmp_path, watch, status, error, words):
    with web_server({}, status=status) as url, pytest.raises(StageError, match=words) as caught:
        fetch_source(source(f"{url}/a.csv?sig=s3cret"), tmp_path, watch)
    assert type(caught.value) is error
    assert "s3cret" not in caught.value.message
    assert not list(tmp_path.glob("**/a.csv"))


def test_nobody_at_the_address_is_tried_again(tmp_path, watch):
    with pytest.raises(StageError, match="could not be reached") as caught:
        fetch_source(source("http://127.0.0.1:9/a.csv"), tmp_path, watch)
    assert not isinstance(caught.value, UserError)


def test_a_model_from_a_web_server_is_asked_for_file_by_file(tmp_path, watch, model_folder):
    with web_server({f"/m/{p.name}": p.read_bytes() for p in model_folder.iterdir()}) as url:
        fetch_model(PlanModel(location=Location(uri=f"{url}/m")), Workspace(tmp_path), watch)
        with pytest.raises(UserError) as caught:
            fetch_model(PlanModel(location=Location(uri=f"{url}/other")), Workspace(tmp_path), watch)
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {p.name for p in (tmp_path / "model").iterdir()}
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


# --- the model hub


@contextmanager
def hub(files: dict[str, bytes], monkeypatch) -> Iterator[list[str]]:
    """The few answers of a model hub that a download needs; yields the requests that it got."""
    requests: list[str] = []
    blobs = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}

    def entry(name: str) -> dict:
        return {"type": "file", "path": name, "size": len(files[name]), "oid": blobs[name]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            requests.append(f"{path} {self.headers['Authorization'] or ''}".strip())
            if "/owner/tiny" not in path:
                self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif "/revision/missing" in path:
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif "/paths-info/" in path:
                asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
                self.answer(200, json.dumps([entry(name) for name in asked if name in files]).encode())
            elif "/tree/" in path:
                self.answer(200, json.dumps([entry(name) for name in files]).encode())
            elif path.startswith("/api/"):
                siblings = [{"rfilename": n, "size": len(c), "blobId": blobs[n]} for n, c in files.items()]
                info = {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}
                self.answer(200, json.dumps(info).encode())
            else:
                name = re.sub(r".*/resolve/[^/]+/", "", path)
                self.answer(200, files[name], {"ETag": f'"{blobs[name]}"', "X-Repo-Commit": COMMIT})

        do_POST = do_GET  # noqa: N815
        do_HEAD = do_GET  # noqa: N815

        def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None):
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", f"http://127.0.0.1:{server.server_port}", raising=False)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    yield requests
    server.shutdown()
    server.server_close()


def hub_files(model_folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in model_folder.iterdir()} | {"code.py": b"boom()", "pytorch_model.bin": b"x"}


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


def test_a_file_of_a_hub_dataset_is_downloaded(tmp_path, watch, monkeypatch):
    with hub({"data/train.csv": b"a,b\n"}, monkeypatch):
        (found,) = fetch_source(source("hf://datasets/owner/tiny/data/train.csv"), tmp_path / "down", watch).files
        assert found.path.read_bytes() == b"a,b\n"
        for missing in ("hf://datasets/owner/tiny/data/other.csv", "hf://datasets/owner/unknown/a.csv"):
            with pytest.raises(UserError, match="does not exist"):
                fetch_source(source(missing), tmp_path / "down", watch)


def test_a_hub_source_must_name_a_dataset(tmp_path, watch):
    with pytest.raises(UserError, match="hf://datasets/owner/name/path"):
        fetch_source(source("hf://owner/name/train.csv"), tmp_path, watch)


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


# --- credentials


def test_secrets_become_the_drivers_options(tmp_path):
    secret = write_secret(
        tmp_path / "secret",
        AWS_ACCESS_KEY_ID="id",
        AWS_SECRET_ACCESS_KEY="key",
        AWS_SESSION_TOKEN="session",
        GOOGLE_APPLICATION_CREDENTIALS='{"type": "service_account"}',
        AZURE_STORAGE_CONNECTION_STRING="Account=x",
        HF_TOKEN="hf",
    )
    options = {
        uri: storage_options(Location(uri=f"{uri}://b/x", secret_dir=secret)) for uri in ("s3", "gs", "az", "hf")
    }
    assert options["s3"] == {"key": "id", "secret": "key", "token": "session", "endpoint_url": None}
    assert options["gs"] == {"token": {"type": "service_account"}}
    assert options["az"] == {"connection_string": "Account=x"}
    assert options["hf"] == {"token": "hf"}


@pytest.mark.parametrize(
    ("uri", "keys", "words"),
    [
        ("s3://b/x", {"AWS_ACCESS_KEY_ID": "id"}, "only one of"),
        ("s3://b/x", {"aws_access_key_id": "id"}, "none of the keys AWS_ACCESS_KEY_ID"),
        ("gs://b/x", {"GOOGLE_APPLICATION_CREDENTIALS": "/path.json"}, "no JSON"),
        ("https://b/x", {"username": "jane"}, "both username and password"),
    ],
)
def test_an_incomplete_secret_is_told_of_without_its_values(tmp_path, uri, keys, words):
    with pytest.raises(UserError, match=words) as caught:
        storage_options(Location(uri=uri, secret_dir=write_secret(tmp_path / "secret", **keys)))
    assert not any(value in caught.value.message for value in keys.values() if value != "id")


def test_a_missing_driver_names_the_extra(monkeypatch):
    def missing(_protocol):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(UserError, match="extra 'gs'"):
        filesystem(Location(uri="gs://bucket/x"))


def test_what_people_see_of_an_address():
    assert display_uri(Location(uri="https://me:pw@host:1/a/b?sig=x#y")) == "https://host:1/a/b"
    assert display_uri(Location(uri="s3://bucket/a?b")) == "s3://bucket/a?b"


def test_what_a_server_in_trouble_says_stays_out_of_the_log():
    class ClientResponseError(Exception):
        status = 503

    location = Location(uri="s3://bucket/a")
    with pytest.raises(StageError) as caught, storage_errors(location, Reason.DATA_NOT_FOUND, "f"):
        raise ClientResponseError("503, url='https://bucket/a?X-Amz-Signature=s3cret'")
    assert "HTTP 503" in caught.value.message
    assert "s3cret" not in format_trace(caught.value, Stage.TRAIN)


def test_a_full_disk_is_no_network_trouble():
    location = Location(uri="s3://bucket/a")
    with pytest.raises(OSError, match="No space"), storage_errors(location, Reason.DATA_NOT_FOUND, "f"):
        raise OSError(28, "No space left on device")
