"""A small API server in memory, over real HTTP: objects, resourceVersions, uids, preconditions, status subresources.

What it does was taken from a real one (1.36): a resourceVersion that is not the newest is 409, a merge patch with a wrong
uid is 422, a delete with a wrong uid is 409; an update of /status changes nothing else.
"""

import json
import random
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from finetune_operator.api import ApiServer
from finetune_operator.observed import merge_patch
from kubernetes.aio.client import Configuration

Manifest = dict[str, Any]


class FakeKubernetes:
    def __init__(self) -> None:
        self.objects: dict[str, Manifest] = {}  # by path
        self.requests: list[tuple[str, str, Any]] = []
        """Method, path with query, body."""
        self.refusals: list[Manifest | int] = []
        """Answers to the next writes, instead of doing them: a Status, or an HTTP status without one."""
        self.refuse_reads = False
        self.lists_per_page = 500
        self.tokens: list[str] = []
        """Of all requests, as they were sent."""
        self._version = 0

    def now(self) -> str:
        return "2026-01-01T00:00:00Z"

    def put(self, path: str, body: Manifest) -> Manifest:
        """Stores an object as if somebody else had written it."""
        self._version += 1
        old = self.objects.get(path)
        metadata = {
            **(body.get("metadata") or {}),
            "resourceVersion": str(self._version),
            "uid": old["metadata"]["uid"] if old else str(uuid.UUID(int=random.getrandbits(128))),
        }
        metadata.setdefault("name", path.rsplit("/", 1)[-1])
        metadata.setdefault("creationTimestamp", self.now())
        if "/namespaces/" in path:
            metadata.setdefault("namespace", re.findall("/namespaces/([^/]+)", path)[0])
        self.objects[path] = {**body, "metadata": metadata}
        return self.objects[path]

    def remove(self, path: str) -> Manifest:
        """Deletes an object as if somebody else had done it."""
        self._version += 1
        return self.objects.pop(path)

    def writes(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path, _ in self.requests if method != "GET"]

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        body = json.loads(text) if text else None
        self.tokens.append(request.headers.get("Authorization", ""))
        self.requests.append((request.method, request.path_qs, body))
        if self.refusals and (request.method != "GET" or self.refuse_reads):
            refusal = self.refusals.pop(0)
            if isinstance(refusal, int):
                return web.Response(status=refusal, text="<html>no Status</html>")
            return web.json_response(refusal, status=refusal["code"])
        answer = self.answer(request.method, request.path, request.query, body)
        return web.json_response(answer, status=answer["code"] if answer.get("kind") == "Status" else 200)

    def answer(self, method: str, path: str, query: Mapping[str, str], body: Any) -> Manifest:
        """What the request brings: an object, a list, or a Status with its `code`."""
        match method:
            case "GET":
                return self._get(query, path)
            case "POST":
                return self._post(path, body)
            case "PUT":
                return self._put(path, body)
            case "PATCH":
                return self._patch(path, body)
            case _:
                return self._delete(path, body)

    def _get(self, query: Mapping[str, str], path: str) -> Manifest:
        if path in self.objects:
            return self.objects[path]
        if path.rsplit("/", 1)[-1] in ("jobs", "pods", "events", "finetunejobs", "networkpolicies", "workloads"):
            items = [
                body
                for name, body in sorted(self.objects.items())
                if path in collections_of(name) and is_selected(body, query)
            ]
            start = int(query.get("continue", "0"))
            end = start + self.lists_per_page
            more = {"continue": str(end)} if end < len(items) else {}
            metadata = {"resourceVersion": str(self._version), **more}
            return {"kind": "List", "metadata": metadata, "items": items[start:end]}
        return status(404, "NotFound", f"{path} not found")

    def _post(self, path: str, body: Manifest) -> Manifest:
        target = f"{path}/{body['metadata']['name']}"
        if target in self.objects:
            return status(409, "AlreadyExists", f"{target} already exists")
        return self.put(target, body)

    def _put(self, path: str, body: Manifest) -> Manifest:
        target = path.removesuffix("/status")
        if target not in self.objects:
            return status(404, "NotFound", f"{path} not found")
        known = self.objects[target]
        for field in ("uid", "resourceVersion"):
            if body["metadata"].get(field) not in (None, known["metadata"][field]):
                return status(409, "Conflict", "the object has been modified")
        return self.put(target, body if path == target else {**known, "status": body["status"]})

    def _patch(self, path: str, body: Manifest) -> Manifest:
        if path not in self.objects:
            return status(404, "NotFound", f"{path} not found")
        known, metadata = self.objects[path], body.get("metadata") or {}
        if metadata.get("resourceVersion") not in (None, known["metadata"]["resourceVersion"]):
            return status(409, "Conflict", "the object has been modified")
        if metadata.get("uid") not in (None, known["metadata"]["uid"]):
            return status(422, "Invalid", "metadata.uid: Invalid value: field is immutable")
        return self.put(path, merge_patch(known, body))

    def _delete(self, path: str, body: Manifest) -> Manifest:
        if path not in self.objects:
            return status(404, "NotFound", f"{path} not found")
        if body["preconditions"]["uid"] != self.objects[path]["metadata"]["uid"]:
            return status(409, "Conflict", "the UID in the precondition does not match")
        if body["propagationPolicy"] == "Foreground":
            known = self.objects[path]
            return self.put(path, {**known, "metadata": {**known["metadata"], "deletionTimestamp": "now"}})
        self.remove(path)
        return {"kind": "Status", "code": 200}


def is_selected(body: Manifest, query: Mapping[str, str]) -> bool:
    """By a `labelSelector` of one label, with or without a value, and a `fieldSelector` of two parts."""
    label, _, value = query.get("labelSelector", "").partition("=")
    labels = body["metadata"].get("labels") or {}
    field, _, wanted = query.get("fieldSelector", "").partition("=")
    group, _, name = field.partition(".")
    found = (body.get(group) or {}).get(name, wanted)
    return (not label or (label in labels and value in ("", labels[label]))) and found == wanted


def collections_of(path: str) -> tuple[str, str]:
    """The lists that hold the object: of its namespace and of all."""
    collection = path.rsplit("/", 1)[0]
    return collection, re.sub("/namespaces/[^/]+", "", collection)


def status(code: int, reason: str, message: str, *causes: str) -> Manifest:
    details = {"causes": [{"reason": cause} for cause in causes]}
    return {"kind": "Status", "code": code, "reason": reason, "message": message, "details": details}


@asynccontextmanager
async def fake_kubernetes() -> AsyncIterator[tuple[FakeKubernetes, ApiServer]]:
    """The server and a connection to it."""
    fake = FakeKubernetes()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", fake.handle)
    async with TestServer(application) as server:
        api = ApiServer(Configuration(host=str(server.make_url("")), api_key={"BearerToken": "bearer t0ken"}))
        yield fake, api
        await api.close()
