"""Pushing the artifacts: to folders, to a real S3 server, to a hub; and what people read when it fails."""

import base64
import errno
import hashlib
import json
import os
import re
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from finetune_api.constants import Reason, Stage
from finetune_api.plan import JobReference, Location
from finetune_trainer.errors import Interrupted, StageError, UserError
from finetune_trainer.publish.push import push
from finetune_trainer.publish.sums import listed_names, write_sums
from finetune_trainer.telemetry import Telemetry

from tests.s3_server import nobody_allowed, s3_server

CARD = "---\ntags:\n- finetune-operator\n---\n"
KEY, PASSWORD = "a-key-id", "a-secret-key-that-nobody-may-see"


class OwnTelemetry(Telemetry):
    """Notes every fraction, and asks to stop at one of them."""

    def __init__(self, stop_at: float | None = None) -> None:
        super().__init__(Stage.PUBLISH, JobReference(namespace="team", name="sentiment", uid="1"), port=0)
        self.fractions: list[float] = []
        self.stop_at = stop_at

    def update(self, **fields) -> None:
        super().update(**fields)
        self.fractions.append(self.progress.fraction)
        if self.stop_at is not None and self.progress.fraction >= self.stop_at:
            self.stop_requested.set()


def make_artifacts(folder: Path, **files: str) -> Path:
    """Files with `__` for a folder, a model card and their SHA256SUMS."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(CARD)
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    write_sums(folder)
    return folder


@pytest.fixture
def artifacts(tmp_path):
    return make_artifacts(tmp_path / "artifacts", model="x" * 600, config="y" * 300, deep__file="z" * 100)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def size(folder: Path) -> int:
    return sum(map(len, contents(folder).values()))


class TestFolder:
    @pytest.fixture
    def location(self, tmp_path):
        return Location(uri="pvc://models/team/sentiment", path=str(tmp_path / "volume" / "team" / "sentiment"))

    def test_gets_all_files(self, artifacts, location):
        telemetry = OwnTelemetry()
        push(artifacts, location, telemetry, done=0.5)
        assert contents(Path(location.path)) == contents(artifacts)
        assert telemetry.fractions[0] == 0.5
        assert telemetry.fractions == sorted(telemetry.fractions)
        assert telemetry.fractions[-1] == 1

    def test_is_replaced_as_a_whole(self, tmp_path, artifacts, location):
        push(make_artifacts(tmp_path / "old", other="1"), location, OwnTelemetry())
        push(artifacts, location, OwnTelemetry())
        assert contents(Path(location.path)) == contents(artifacts)
        assert [path.name for path in Path(location.path).parent.iterdir()] == ["sentiment"]

    def test_may_be_there_and_empty(self, artifacts, location):
        Path(location.path).mkdir(parents=True)
        push(artifacts, location, OwnTelemetry())
        assert contents(Path(location.path)) == contents(artifacts)

    def test_with_other_files_is_left_alone(self, artifacts, location):
        Path(location.path).mkdir(parents=True)
        (Path(location.path) / "thesis.tex").write_text("years of work")
        with pytest.raises(UserError, match=r"output\.uri: pvc://models/team/sentiment holds other files") as raised:
            push(artifacts, location, OwnTelemetry())
        assert raised.value.reason is Reason.OUTPUT_FAILED
        assert contents(Path(location.path)) == {"thesis.tex": b"years of work"}

    @pytest.mark.parametrize("name", ["notes.txt", "deep/notes.txt", "other-job/model", "empty/"])
    def test_with_other_files_beside_a_published_model_is_left_alone(self, tmp_path, artifacts, location, name):
        push(make_artifacts(tmp_path / "old", deep__shard="1"), location, OwnTelemetry())
        other = Path(location.path) / name
        (other if name.endswith("/") else other.parent).mkdir(exist_ok=True)
        if not name.endswith("/"):
            other.write_text("mine")
        before = contents(Path(location.path))
        with pytest.raises(UserError, match="holds other files") as raised:
            push(artifacts, location, OwnTelemetry())
        assert raised.value.reason is Reason.OUTPUT_FAILED
        assert other.exists()
        assert contents(Path(location.path)) == before

    def test_with_hashes_of_somebody_else_is_left_alone(self, artifacts, location):
        folder = Path(location.path)
        theirs = make_artifacts(folder, disk="image")
        (theirs / "README.md").write_text("How to burn the disk")
        write_sums(theirs)
        with pytest.raises(UserError, match="holds other files"):
            push(artifacts, location, OwnTelemetry())
        assert (folder / "disk").read_text() == "image"

    def test_that_is_a_file_is_left_alone(self, artifacts, location):
        Path(location.path).parent.mkdir(parents=True)
        Path(location.path).write_text("a file")
        with pytest.raises(UserError, match="holds other files"):
            push(artifacts, location, OwnTelemetry())
        assert Path(location.path).read_text() == "a file"

    @pytest.mark.parametrize("stop_at", [0, 0.3, 0.9])
    def test_is_the_old_one_after_a_stop(self, tmp_path, artifacts, location, stop_at):
        old = make_artifacts(tmp_path / "old", other="1")
        push(old, location, OwnTelemetry())
        with pytest.raises(Interrupted):
            push(artifacts, location, OwnTelemetry(stop_at))
        assert contents(Path(location.path)) == contents(old)
        assert [path.name for path in Path(location.path).parent.iterdir()] == ["sentiment"]

    @pytest.mark.parametrize(
        ("number", "expected"),
        [
            (errno.ENOSPC, StageError(Reason.OUTPUT_FAILED, "no space left in pvc://models/team/sentiment")),
            (errno.EDQUOT, StageError(Reason.OUTPUT_FAILED, "no space left in pvc://models/team/sentiment")),
            (errno.EROFS, UserError(Reason.OUTPUT_FAILED, "pvc://models/team/sentiment is on a read-only volume")),
            (errno.EACCES, UserError(Reason.OUTPUT_FAILED, "may not be used: its file mode")),
        ],
    )
    def test_that_cannot_be_written_is_told_as_such(self, monkeypatch, artifacts, location, number, expected):
        def refuse(*_arguments, **_settings):
            raise OSError(number, os.strerror(number), location.path)

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(StageError, match=expected.message) as raised:
            push(artifacts, location, OwnTelemetry())
        assert (type(raised.value), raised.value.reason) == (type(expected), expected.reason)


@pytest.fixture(scope="module")
def s3_url():
    with s3_server() as url:
        yield url


class TestS3:
    @pytest.fixture
    def secret(self, tmp_path, s3_url):
        folder = tmp_path / "secret"
        folder.mkdir()
        values = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": PASSWORD, "AWS_ENDPOINT_URL": s3_url}
        for name, value in values.items():
            (folder / name).write_text(value)
        return folder

    @pytest.fixture
    def location(self, secret):
        return Location(uri="s3://models/team/sentiment", secret_dir=str(secret))

    @pytest.fixture
    def bucket(self, s3_url):
        client = boto3.client(
            "s3",
            endpoint_url=s3_url,
            aws_access_key_id=KEY,
            aws_secret_access_key=PASSWORD,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="models")
        yield boto3.resource(
            "s3",
            endpoint_url=s3_url,
            aws_access_key_id=KEY,
            aws_secret_access_key=PASSWORD,
            region_name="us-east-1",
        ).Bucket("models")
        urllib.request.urlopen(urllib.request.Request(f"{s3_url}/moto-api/reset", method="POST")).close()

    def objects(self, bucket) -> dict[str, bytes]:
        return {item.key: item.get()["Body"].read() for item in bucket.objects.all()}

    def under_root(self, artifacts: Path) -> dict[str, bytes]:
        return {f"team/sentiment/{name}": content for name, content in contents(artifacts).items()}

    def test_gets_all_files(self, artifacts, location, bucket):
        telemetry = OwnTelemetry()
        push(artifacts, location, telemetry)
        assert self.objects(bucket) == self.under_root(artifacts)
        assert telemetry.fractions == sorted(telemetry.fractions)
        assert telemetry.fractions[-1] == 1

    def test_takes_a_uri_with_a_slash_at_its_end(self, artifacts, location, bucket):
        push(artifacts, location.model_copy(update={"uri": location.uri + "/"}), OwnTelemetry())
        assert self.objects(bucket) == self.under_root(artifacts)

    def test_gets_the_hashes_last(self, artifacts, location, bucket):
        everything_else = 1 - len(contents(artifacts)["SHA256SUMS"]) / size(artifacts)
        with pytest.raises(Interrupted):
            push(artifacts, location, OwnTelemetry(stop_at=everything_else))
        missing = self.under_root(artifacts).keys() - self.objects(bucket).keys()
        assert missing == {"team/sentiment/SHA256SUMS"}

    def test_can_be_stopped_and_pushed_to_again(self, artifacts, location, bucket):
        with pytest.raises(Interrupted) as raised:
            push(artifacts, location, OwnTelemetry(stop_at=0.1))
        assert raised.value.exit_code == 75
        assert "team/sentiment/SHA256SUMS" not in self.objects(bucket)
        push(artifacts, location, OwnTelemetry())
        assert self.objects(bucket) == self.under_root(artifacts)

    def test_loses_what_was_published_before_and_nothing_else(self, tmp_path, artifacts, location, bucket):
        bucket.put_object(Key="team/sentiment/notes.txt", Body=b"mine")
        bucket.put_object(Key="team/other", Body=b"theirs")
        push(make_artifacts(tmp_path / "old", model="0", shard="1", deep__shard="2"), location, OwnTelemetry())
        bucket.Object("team/sentiment/shard").delete()  # as if an attempt had been stopped here
        push(artifacts, location, OwnTelemetry())
        foreign = {"team/sentiment/notes.txt": b"mine", "team/other": b"theirs"}
        assert self.objects(bucket) == self.under_root(artifacts) | foreign

    def test_loses_no_files_that_somebody_else_published(self, artifacts, location, bucket):
        theirs = {"disk": b"image", "SHA256SUMS": f"{'0' * 64}  disk\n".encode(), "README.md": b"How to burn it"}
        for name, content in theirs.items():
            bucket.put_object(Key=f"team/sentiment/{name}", Body=content)
        with pytest.raises(Interrupted):  # between the model card, which is now ours, and the hashes
            push(
                artifacts, location, OwnTelemetry(stop_at=1 - len(contents(artifacts)["SHA256SUMS"]) / size(artifacts))
            )
        push(artifacts, location, OwnTelemetry())
        assert self.objects(bucket) == self.under_root(artifacts) | {"team/sentiment/disk": b"image"}

    def test_loses_nothing_to_a_list_that_leads_elsewhere(self, artifacts, location, bucket):
        bucket.put_object(Key="team/other", Body=b"theirs")
        card = f"{hashlib.sha256(CARD.encode()).hexdigest()}  README.md\n"
        hostile = f"{card}{'0' * 64}  ../other\n{'0' * 64}  /models/team/other\nnonsense\n".encode() + b"\xff"
        bucket.put_object(Key="team/sentiment/SHA256SUMS", Body=hostile)
        bucket.put_object(Key="team/sentiment/README.md", Body=CARD.encode())
        push(artifacts, location, OwnTelemetry())
        assert self.objects(bucket) == self.under_root(artifacts) | {"team/other": b"theirs"}

    @pytest.mark.usefixtures("bucket")
    def test_without_the_bucket_is_the_users_error(self, artifacts, location):
        wrong = location.model_copy(update={"uri": "s3://modells/sentiment"})
        with pytest.raises(UserError, match=r"output\.uri: s3://modells/sentiment does not exist") as raised:
            push(artifacts, wrong, OwnTelemetry())
        assert raised.value.reason is Reason.OUTPUT_FAILED

    def test_without_permission_is_the_users_error_and_tells_no_secret(self, artifacts, location, bucket, s3_url):
        refused = pytest.raises(UserError, match="may not be used: the credentials in its Secret")
        with nobody_allowed(s3_url), refused as raised:
            push(artifacts, location, OwnTelemetry())
        assert raised.value.reason is Reason.OUTPUT_FAILED
        assert PASSWORD not in raised.value.message
        assert self.objects(bucket) == {}

    def test_that_does_not_answer_is_tried_again(self, artifacts, location, secret, monkeypatch):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
        (secret / "AWS_ENDPOINT_URL").write_text("http://127.0.0.1:9")
        with pytest.raises(StageError, match=r"output\.uri: s3://models/team/sentiment could not be reached") as raised:
            push(artifacts, location, OwnTelemetry())
        assert (raised.value.exit_code, raised.value.reason) == (1, Reason.OUTPUT_FAILED)


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as a push needs: one repository, files as plain commits."""

    daemon_threads = True
    token = "hf_good"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.visibility: str | None = None
        self.commits = 0
        self.slow = threading.Event()
        self.slow.set()
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    BASE = "/api/models/owner/tuned"

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.server.visibility = json.loads(body)["visibility"]
            self.answer({"url": f"{self.server.url}/owner/tuned"})
        elif self.path.startswith("/owner/tuned/resolve/main/"):
            self.send_content(self.path.removeprefix("/owner/tuned/resolve/main/"))
        elif self.path.startswith(f"{self.BASE}/tree/main"):
            entries = self.server.files.items()
            self.answer([{"type": "file", "path": name, "size": len(b), "oid": "0"} for name, b in entries])
        elif self.path == f"{self.BASE}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.path.startswith(f"{self.BASE}/commit/main"):
            self.server.slow.wait(20)
            self.commit(body)
        elif self.path.startswith("/api/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": self.path}, 404)

    do_GET = do_HEAD = do_POST = handle_request  # noqa: N815

    def commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            name = line["value"].get("path")
            if line["key"] == "file":
                self.server.files[name] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del self.server.files[name]
        self.server.commits += 1
        self.answer({"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.server.url}/owner/tuned/commit/c"})

    def send_content(self, name: str) -> None:
        content = self.server.files.get(name)
        if content is None:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            headers = {"ETag": f'"{hash(content):x}"', "X-Repo-Commit": "c" * 40}
            self.send(content if self.command == "GET" else b"", 200, headers | {"Content-Length": str(len(content))})

    def answer(self, document, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        basic = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.send(b"" if self.command == "HEAD" else body, status, basic | (headers or {}))

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments) -> None:
        pass


class TestHub:
    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        with Hub() as server:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
            monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
            yield server
            server.slow.set()
            server.shutdown()

    @pytest.fixture
    def location(self, tmp_path):
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "HF_TOKEN").write_text("hf_good\n")
        return Location(uri="hf://owner/tuned", secret_dir=str(tmp_path / "secret"))

    def test_gets_all_files_in_one_commit_to_a_private_repository(self, artifacts, location, hub):
        push(artifacts, location, OwnTelemetry())
        assert hub.files == contents(artifacts)
        assert (hub.visibility, hub.commits) == ("private", 1)

    def test_loses_what_was_published_before_and_nothing_else(self, tmp_path, artifacts, location, hub):
        hub.files["notes.txt"] = b"mine"
        push(make_artifacts(tmp_path / "old", model="0", shard="1"), location, OwnTelemetry())
        push(artifacts, location, OwnTelemetry())
        assert hub.files == contents(artifacts) | {"notes.txt": b"mine"}

    def test_loses_no_files_that_somebody_else_published(self, artifacts, location, hub):
        hub.files |= {"disk": b"image", "SHA256SUMS": f"{'0' * 64}  disk\n".encode(), "README.md": b"How to burn it"}
        push(artifacts, location, OwnTelemetry())
        assert hub.files == contents(artifacts) | {"disk": b"image"}

    def test_with_a_wrong_token_is_the_users_error_and_tells_no_token(self, tmp_path, artifacts, location, hub):
        (tmp_path / "secret" / "HF_TOKEN").write_text("hf_wrong")
        with pytest.raises(UserError, match=r"output\.uri: hf://owner/tuned may not be used") as raised:
            push(artifacts, location, OwnTelemetry())
        assert raised.value.reason is Reason.OUTPUT_FAILED
        assert "hf_wrong" not in raised.value.message
        assert hub.files == {}

    @pytest.mark.parametrize("uri", ["hf://tuned", "hf://owner/tuned/folder"])
    def test_needs_the_name_of_a_repository(self, artifacts, location, uri):
        with pytest.raises(UserError, match=re.escape(f"{uri} is no model repository; write hf://owner/name")):
            push(artifacts, location.model_copy(update={"uri": uri}), OwnTelemetry())

    def test_that_is_away_is_tried_again(self, artifacts, location, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(StageError, match="could not be reached") as raised:
            push(artifacts, location, OwnTelemetry())
        assert (raised.value.exit_code, raised.value.reason) == (1, Reason.OUTPUT_FAILED)

    def test_that_is_slow_can_be_left(self, artifacts, location, hub):
        hub.slow.clear()
        telemetry = OwnTelemetry()
        threading.Timer(0.5, telemetry.stop_requested.set).start()
        with pytest.raises(Interrupted):
            push(artifacts, location, telemetry)
        assert hub.commits == 0


def test_hashing_can_be_stopped(tmp_path):
    (tmp_path / "model").write_bytes(b"x")

    def stop():
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        write_sums(tmp_path, stop)
    assert not (tmp_path / "SHA256SUMS").exists()


@pytest.mark.parametrize(
    ("sums", "names"),
    [
        ("", set()),
        (f"{'0' * 64}  a b\n{'0' * 64} *c/d\n", {"a b", "c/d"}),
        (f"{'0' * 64}  ../x\n{'0' * 64}  a/../../x\n{'0' * 64}  /x\n{'0' * 64}  \nshort\n", set()),
    ],
)
def test_a_list_of_hashes_leads_nowhere_else(sums, names):
    assert listed_names(sums) == names
