"""A real S3 server (moto's) as a process of its own."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def s3_server() -> Iterator[str]:
    """URL of an empty S3 server that lives as long as the block."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            _wait(url, process)
            yield url
        finally:
            process.terminate()


@contextmanager
def nobody_allowed(url: str) -> Iterator[None]:
    """The server at `url` refuses all credentials."""
    _post(f"{url}/moto-api/reset-auth", b"0")  # actions that are carried out before credentials are looked at
    try:
        yield
    finally:
        _post(f"{url}/moto-api/reset-auth", b"inf")


def _post(url: str, data: bytes) -> None:
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "text/plain"}, method="POST")
    with urllib.request.urlopen(request, timeout=10):
        pass


def _wait(url: str, process: "subprocess.Popen[bytes]", seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, "the S3 server did not start"
            assert time.monotonic() < end, "the S3 server does not answer"
            time.sleep(0.1)
