"""Talks to the API server: JSON in, JSON out, errors in the server's own words.

`kubernetes.aio` finds the server and keeps the credentials fresh (a pod's token rotates); objects stay dicts.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

from finetune_operator.observed import Manifest
from finetune_operator.request_counter import RequestCounter

PAGE_SIZE = 500

MERGE_PATCH = "application/merge-patch+json"

_UNREADABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")
"""What a reader of YAML refuses to see as it is; JSON itself escapes the controls below these."""


class ApiError(Exception):
    """The API server refused, or did not answer (`status` 0). The message is the server's."""

    def __init__(self, status: int, message: str, reason: str = "", causes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        """A word of metav1.StatusReason: AlreadyExists, Conflict, Forbidden..."""
        self.causes = causes
        """Reasons of details.causes, for example NamespaceTerminating."""


async def load_configuration() -> Configuration:
    """Where the API server is: KUBECONFIG if it is set, else the pod's service account, else ~/.kube/config.

    Raises kubernetes.aio.config.ConfigException if there is none of these.
    """
    configuration = Configuration()
    if os.environ.get("KUBECONFIG") or "KUBERNETES_SERVICE_HOST" not in os.environ:
        await kubernetes_config.load_kube_config(client_configuration=configuration)
    else:
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    return configuration


def api_path(api_version: str, plural: str, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
    """Path of a collection or, with a name, of an object. `namespace` None: of all namespaces."""
    parts = [("apis/" if "/" in api_version else "api/") + api_version]
    if namespace is not None:
        parts += ["namespaces", quote(namespace, safe="")]
    parts.append(plural)
    parts += [quote(part, safe="") for part in (name, subresource) if part]
    return "/" + "/".join(parts)


def to_json(body: Manifest) -> bytes:
    """JSON that is YAML, too, for as such the API server reads an apply: it knows no surrogate pairs, as which `json`
    would write a character like 🙂. A lone surrogate is no character and becomes U+FFFD.
    """

    def escape(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\u{0xFFFD if 0xD800 <= code <= 0xDFFF else code:04x}"

    return _UNREADABLE.sub(escape, json.dumps(body, ensure_ascii=False)).encode()


class ApiServer:
    """A connection pool to the API server. For one event loop."""

    def __init__(self, configuration: Configuration) -> None:
        self.url: str = configuration.host.rstrip("/")
        self.last_answer: float | None = None
        """time.monotonic() when the server last answered anything."""
        self.counter = RequestCounter()
        """Of the requests of all sessions."""
        self._configuration = configuration
        self._tls = RESTClientObject(configuration).ssl_context
        self._session: aiohttp.ClientSession | None = None

    def open_session(self, *middlewares: aiohttp.ClientMiddlewareType) -> aiohttp.ClientSession:
        """A session for the running event loop, whose requests carry the newest credentials."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls, limit=0),
            headers={"User-Agent": "finetune-operator"},
            middlewares=(self._authorize, self.counter, *middlewares),
            proxy=self._configuration.proxy,
        )

    async def _authorize(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        for credential in (await self._configuration.auth_settings()).values():
            request.headers[credential["key"]] = credential["value"]
        return await handler(request)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Manifest | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        timeout: float = 10.0,  # noqa: ASYNC109 (it is the request's own)
    ) -> Manifest:
        """One request; the answer's JSON. Raises ApiError."""
        if self._session is None:
            self._session = self.open_session()
        try:
            async with self._session.request(
                method,
                self.url + path,
                params=query,
                data=None if body is None else to_json(body),
                headers={"Content-Type": content_type, "Accept": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout),
            ) as response:
                text = await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            words = str(error) or (f"no answer in {timeout:.0f} s" if isinstance(error, TimeoutError) else repr(error))
            raise ApiError(0, f"the API server at {self.url} cannot be reached: {words}") from error
        self.last_answer = time.monotonic()
        try:
            answer = json.loads(text)
        except ValueError:  # of a proxy, or a panicking server
            answer = {}
        if response.status >= 400:
            raise _read_error(response.status, response.reason or "", answer)
        if not isinstance(answer, dict):
            raise ApiError(0, f"{self.url} does not answer like a Kubernetes API server")
        return answer

    async def list_all(self, path: str, query: Mapping[str, str] | None = None) -> tuple[list[Manifest], str]:
        """All objects of a collection and the resourceVersion at which the list is true. Raises ApiError."""
        while True:
            try:
                return await self._list_pages(path, query or {})
            except ApiError as error:
                if error.status != 410:  # the list changed for too long while we read its pages
                    raise
                await asyncio.sleep(1)

    async def _list_pages(self, path: str, query: Mapping[str, str]) -> tuple[list[Manifest], str]:
        items: list[Manifest] = []
        token = ""
        while True:
            page = {"limit": str(PAGE_SIZE), **query} | ({"continue": token} if token else {})
            answer = await self.request("GET", path, query=page, timeout=30)
            items += answer.get("items") or []
            token = answer["metadata"].get("continue") or ""
            if not token:
                return items, answer["metadata"].get("resourceVersion", "")


def _read_error(status: int, phrase: str, answer: Any) -> ApiError:
    if not isinstance(answer, dict) or answer.get("kind") != "Status":
        return ApiError(status, f"the API server answered {status} {phrase}")
    causes = (answer.get("details") or {}).get("causes") or ()
    return ApiError(
        status,
        answer.get("message") or phrase,
        answer.get("reason") or "",
        tuple(cause.get("reason", "") for cause in causes),
    )
