"""Counts the requests to the API server, in the words of RBAC: which rights are used, and which are missing."""

import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus

import aiohttp
from prometheus_client import Counter, Metric
from prometheus_client.registry import Collector

VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}
"""Of the methods that have one verb each."""

NO_ANSWER = "none"
"""In place of an HTTP status: the server could not be reached, or the request was given up."""

RESOURCE_PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/[^/]+"  # with the version
    r"(?:/namespaces/[^/]+)?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<subresource>[^/]+))?)?"
)

MISSING_RIGHT = re.compile(r"User \S+ cannot \S+ (resource|path) ")
"""What RBAC says, and neither quotas nor admission policies, which answer 403 too."""


def right_for(method: str, path: str, query: Mapping[str, str]) -> tuple[str, str]:
    """Verb and resource of a request, as a rule of a Role names them: `("patch", "finetunejobs.<group>/status")`.

    A path that is about no resource stands for itself.
    """
    found = RESOURCE_PATH.fullmatch(path)
    if found is None:
        return method.lower(), path
    group, plural, name, subresource = found["group"], found["plural"], found["name"], found["subresource"]
    resource = plural + (f".{group}" if group else "") + (f"/{subresource}" if subresource else "")
    if method == "GET":
        return "get" if name else "watch" if "watch" in query else "list", resource
    if method == "DELETE":
        return "delete" if name else "deletecollection", resource
    return VERBS.get(method, method.lower()), resource


class RequestCounter(Collector):
    """A middleware of aiohttp's client, and the metrics that it keeps. Any thread may use it."""

    def __init__(self) -> None:
        self._requests = Counter(
            "finetune_operator_api_requests",
            "Requests to the API server by verb and resource, as RBAC names them, and HTTP status "
            f"({NO_ANSWER}: there was no answer).",
            ["verb", "resource", "code"],
            registry=None,
        )
        self._forbidden = Counter(
            "finetune_operator_api_requests_forbidden",
            "Requests that the API server refused because the operator has no right to make them.",
            ["verb", "resource"],
            registry=None,
        )

    async def __call__(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        verb, resource = right_for(request.method, request.url.raw_path, request.url.query)
        code = NO_ANSWER
        try:
            response = await handler(request)
            code = str(response.status)
            if response.status == HTTPStatus.FORBIDDEN and MISSING_RIGHT.search(await response.text(errors="replace")):
                self._forbidden.labels(verb, resource).inc()
        finally:
            self._requests.labels(verb, resource, code).inc()
        return response

    def collect(self) -> Iterator[Metric]:
        yield from self._requests.collect()
        yield from self._forbidden.collect()
