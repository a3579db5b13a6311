"""HTTP for the kubelet and Prometheus: /healthz, /readyz, /metrics."""

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

Check = Callable[[], tuple[bool, str]]
"""Whether all is well, and words about it for people."""


class Server:
    """`async with Server(...)` serves until it is left. Raises OSError if the port is taken."""

    def __init__(self, port: int, healthy: Check, ready: Check, registry: CollectorRegistry) -> None:
        async def metrics(_: web.Request) -> web.Response:
            headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
            return web.Response(body=generate_latest(registry), headers=headers)

        application = web.Application()
        application.router.add_get("/healthz", _page(healthy))
        application.router.add_get("/readyz", _page(ready))
        application.router.add_get("/metrics", metrics)
        self._port = port
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.2)

    async def __aenter__(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, port=self._port).start()  # on all addresses, of IPv4 and IPv6

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def _page(check: Check) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_: web.Request) -> web.Response:
        well, words = check()
        return web.Response(status=200 if well else 503, text=f"{words}\n")

    return answer
