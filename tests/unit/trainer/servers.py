"""Servers to fetch from, each in a thread: an S3 server, a web server, a small model hub."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import boto3

from tests.s3_server import s3_server

COMMIT = "c" * 40


def write_secret(folder: Path, **keys: str) -> str:
    folder.mkdir(exist_ok=True)
    for name, value in keys.items():
        (folder / name).write_text(value + "\n")  # as `kubectl create secret --from-file` often leaves it
    return str(folder)


@contextmanager
def s3_bucket(secret: Path) -> Iterator[tuple[Any, str]]:
    """An S3 server with the bucket `bucket`: a client of it, and the folder of a Secret for it."""
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
        yield client, write_secret(secret, **keys)


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
