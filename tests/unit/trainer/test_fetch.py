"""Data from this machine and from real servers (`servers`): which files a source is, and what is told of its trouble."""

import base64
import logging

import pytest
from finetune_api.constants import Reason
from finetune_api.plan import PlanSource
from finetune_trainer.errors import StageError, UserError
from finetune_trainer.fetch import fetch_source

from tests.unit.trainer.servers import hub, web_server, write_secret


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


# --- https


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


# --- the model hub


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
