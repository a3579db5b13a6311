"""Where URIs point to: one fsspec filesystem per `Location`, its credentials, and its errors in the user's words.

with storage_errors(location, Reason.DATA_NOT_FOUND, "dataset.sources[0].uri"):
    files, path = filesystem(location)
    files.get_file(path, target)
"""

import errno
import json
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from finetune_api.constants import Reason
from finetune_api.plan import Location

from finetune_trainer.errors import StageError, UserError

EXTRAS = {"s3": "s3", "gs": "gs", "az": "az"}
"""Scheme -> extra of this project that brings its fsspec driver."""

SECRET_KEYS = {
    "hf": ("HF_TOKEN",),
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "az": ("AZURE_STORAGE_CONNECTION_STRING",),
    "http": ("username", "password"),
    "https": ("username", "password"),
}
"""Scheme -> the keys of a Secret that matter to it. http is for servers inside a test; the CRD refuses it."""

CONNECT_TIMEOUT = READ_TIMEOUT = 60.0
"""Seconds for a connection and between two reads over https; a whole file may take as long as it needs."""

LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EROFS)
"""What is wrong with this machine, not with the URI."""

TRANSIENT_CLIENT_ERRORS = (408, 425, 429)
DRIVER_PACKAGES = ("aiohttp", "botocore", "huggingface_hub", "httpx", "httpx2", "httpcore", "google", "gcsfs", "azure")


def scheme(location: Location) -> str:
    return location.uri.partition("://")[0]


def display_uri(location: Location) -> str:
    """The URI for people: without a user's name and password and without a query, which may hold a signature."""
    if scheme(location) not in ("http", "https"):
        return location.uri
    parts = urlsplit(location.uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def credentials(location: Location) -> dict[str, str]:
    """Keys of the location's Secret that its scheme knows. Raises UserError if the Secret holds none of them."""
    if location.secret_dir is None:
        return {}
    known = SECRET_KEYS.get(scheme(location), ())
    folder = Path(location.secret_dir)
    found = {key: (folder / key).read_text(encoding="utf-8").strip() for key in known if (folder / key).is_file()}
    if known and not found:
        raise _secret_error(location, f"has none of the keys {', '.join(known)}")
    return found


def storage_options(location: Location) -> dict[str, Any]:
    """Arguments of the location's fsspec filesystem. Without a Secret the driver finds credentials by itself
    (a cloud's workload identity). Raises UserError for an incomplete Secret.
    """
    keys = credentials(location)
    match scheme(location):
        case "hf":
            return {"token": hf_token(location)}
        case "s3":
            return _s3_options(location, keys)
        case "gs" if keys:
            return {"token": _service_account(location, keys["GOOGLE_APPLICATION_CREDENTIALS"])}
        case "az" if keys:
            return {"connection_string": keys["AZURE_STORAGE_CONNECTION_STRING"]}
        case "http" | "https":
            return {"client_kwargs": _http_client(location, keys)}
    return {}


def hf_token(location: Location) -> str | None:
    """Token for huggingface_hub; None, which lets it look into the environment, without a Secret."""
    return credentials(location).get("HF_TOKEN")


def filesystem(location: Location) -> tuple[Any, str]:
    """The fsspec filesystem of a location and the location's path in it, for reading and writing.

    A location with a `path` (pvc, configmap, file) is a path on this machine; for hf it is `owner/name/...` or
    `datasets/owner/name/...`. Raises UserError if the driver is not installed or the Secret is incomplete.
    """
    if location.path is not None:
        return fsspec.filesystem("file"), location.path
    kind = scheme(location)
    if kind not in SECRET_KEYS:
        raise UserError(Reason.INVALID_SPEC, f"{kind}:// cannot be reached from this pod")
    try:
        driver = fsspec.get_filesystem_class(kind)
    except ImportError:
        remedy = f"build the trainer image with the extra '{EXTRAS[kind]}'" if kind in EXTRAS else "see the docs"
        raise UserError(Reason.INVALID_SPEC, f"the trainer has no driver for {kind}://: {remedy}") from None
    # no caches: a listing from before a write would be wrong after it
    options = storage_options(location) | {"skip_instance_cache": True, "use_listings_cache": False}
    return driver(**options), driver._strip_protocol(location.uri)


@contextmanager
def storage_errors(location: Location, reason: Reason, field: str) -> Iterator[None]:
    """Turns what drivers raise into UserError(reason) if the URI does not exist or may not be used, and into
    StageError, which is tried again, for a network in trouble. `field` names the place in the spec.
    """
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
            raise
        shown = f"{field}: {display_uri(location)}"
        match _kind(error):
            case "missing":
                raise UserError(reason, f"{shown} does not exist (or may not be seen without credentials)") from None
            case "forbidden":
                raise UserError(reason, f"{shown} may not be used: {_remedy(location)}") from None
            case "refused":
                raise UserError(reason, f"{shown} was refused by the server ({_name(error)}): check the URI") from None
            case "network":
                message = f"{shown} could not be reached ({_name(error)}); it will be tried again"
                raise StageError(Reason.STAGE_FAILED, message) from None  # its own text may hold a signed URL
        raise


def _kind(error: Exception) -> str | None:
    """What sort of trouble a driver's exception tells, by its HTTP status, type or package; None: not theirs."""
    chain = _causes(error)
    names = [type(cause).__name__ for cause in chain]
    status = _first_status(chain)
    kind: str | None = None
    if "RepositoryNotFoundError" in names:  # the hub says 401 for it
        kind = "missing"
    elif status is not None and status >= 400:
        kind = _kind_of_status(status)
    elif any("Credentials" in name for name in names) or any(isinstance(cause, PermissionError) for cause in chain):
        kind = "forbidden"
    elif any("ValidationError" in name for name in names):  # a name that no repository or bucket can have
        kind = "refused"
    elif any(type(cause).__module__.partition(".")[0] in DRIVER_PACKAGES for cause in chain):
        kind = "network"  # also where it led to a FileNotFoundError: no server said so
    elif any(isinstance(cause, (FileNotFoundError, NotADirectoryError)) for cause in chain):
        kind = "missing"
    elif isinstance(error, (OSError, TimeoutError)):
        kind = "network"
    return kind


def _kind_of_status(status: int) -> str:
    if status in (401, 403):
        return "forbidden"
    if status in (404, 410):
        return "missing"
    return "refused" if status < 500 and status not in TRANSIENT_CLIENT_ERRORS else "network"


def _first_status(chain: list[BaseException]) -> int | None:
    return next((status for cause in chain if (status := _http_status(cause)) is not None), None)


def _http_status(error: BaseException) -> int | None:
    """The status as aiohttp, requests-like, azure, gcsfs and botocore errors carry it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        candidates = (response, error)
        names = ("status_code", "status", "code")
        values = (getattr(candidate, name, None) for candidate in candidates for name in names)
        found = next((value for value in values if value is not None), None)
    text = str(found)
    return int(text) if text.isdecimal() and 100 <= int(text) < 600 else None


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _name(error: BaseException) -> str:
    """Type and status: a driver's own text may hold a signed URL."""
    chain = _causes(error)
    status = _first_status(chain)
    return f"HTTP {status}" if status else type(chain[-1]).__name__


def _remedy(location: Location) -> str:
    keys = SECRET_KEYS.get(scheme(location))
    if location.path is not None or keys is None:
        return "its file mode does not let this user in"
    if location.secret_dir is None:
        return f"name a Secret with {', '.join(keys)} in secretRef"
    return "the credentials in its Secret do not permit it"


def _secret_error(location: Location, what: str) -> UserError:
    return UserError(Reason.INVALID_SPEC, f"the Secret for {display_uri(location)} {what}")


def _s3_options(location: Location, keys: dict[str, str]) -> dict[str, Any]:
    if ("AWS_ACCESS_KEY_ID" in keys) != ("AWS_SECRET_ACCESS_KEY" in keys):
        raise _secret_error(location, "has only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    options: dict[str, Any] = {
        "key": keys.get("AWS_ACCESS_KEY_ID"),
        "secret": keys.get("AWS_SECRET_ACCESS_KEY"),
        "token": keys.get("AWS_SESSION_TOKEN"),
        "endpoint_url": keys.get("AWS_ENDPOINT_URL"),
    }
    if "AWS_REGION" in keys:
        options["client_kwargs"] = {"region_name": keys["AWS_REGION"]}
    return options


def _service_account(location: Location, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise _secret_error(location, "has no JSON in GOOGLE_APPLICATION_CREDENTIALS") from None


def _http_client(location: Location, keys: dict[str, str]) -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
    client: dict[str, Any] = {"timeout": timeout, "trust_env": True}
    if keys:
        if set(keys) != {"username", "password"}:
            raise _secret_error(location, "needs both username and password")
        login = f"{keys['username']}:{keys['password']}".encode()
        client["headers"] = {"Authorization": f"Basic {b64encode(login).decode()}"}
    return client
