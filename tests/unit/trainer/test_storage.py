"""Addresses, credentials, and whose trouble an error of a server is."""

import pytest
from finetune_api.constants import Reason, Stage
from finetune_api.plan import Location
from finetune_trainer.errors import StageError, UserError
from finetune_trainer.failure import format_trace
from finetune_trainer.storage import display_uri, filesystem, storage_errors, storage_options

from tests.unit.trainer.servers import s3_bucket, write_secret


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_bucket(tmp_path_factory.mktemp("secret") / "s3") as bucket:
        yield bucket


def test_a_server_that_is_away_is_tried_again(tmp_path):
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
