"""Plays trainer pods: an HTTP server on their addresses, which notes when each is asked."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from finetune_api.constants import TELEMETRY_PORT, Stage
from finetune_api.progress import Progress


@dataclass
class Trainer:
    """One pod. `seconds` it takes to answer."""

    seconds: float
    asked: list[float] = field(default_factory=list)
    asked_at_once: int = 0
    most_at_once: int = 0

    def gaps(self) -> list[float]:
        """Seconds between two questions."""
        return [later - earlier for earlier, later in zip(self.asked, self.asked[1:], strict=False)]


class Trainers:
    """`moving`: each answer tells of another step. A tenth of the trainers are slow."""

    def __init__(self, addresses: Sequence[str], moving: bool, seed: int = 0) -> None:
        draw = random.Random(seed)
        self.of = {address: Trainer(1.5 if draw.random() < 0.1 else draw.uniform(0, 0.1)) for address in addresses}
        self._moving = moving
        self._began = time.time()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        application = web.Application()
        application.router.add_get("/progress", self._answer)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            for address in self.of:
                await web.TCPSite(runner, address, TELEMETRY_PORT).start()
            yield
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        trainer = self.of[request.host.partition(":")[0]]
        trainer.asked.append(time.monotonic())
        trainer.asked_at_once += 1
        trainer.most_at_once = max(trainer.most_at_once, trainer.asked_at_once)
        await asyncio.sleep(trainer.seconds)
        trainer.asked_at_once -= 1
        now = time.time() if self._moving else self._began
        step = int(now - self._began)
        progress = Progress(
            stage=Stage.TRAIN, activity="Training", fraction=min(1.0, step / 3600), step=step, total_steps=3600,
            estimated_remaining_seconds=3600.0 - step, training_loss=2.0 - step / 3600, learning_rate=1e-4,
            tokens_per_second=5000.0, samples_per_second=100.0, peak_memory_bytes=10**9, precision="bf16",
            device="fake", trainable_parameters=300_000, updated_at=now,
        )  # fmt: skip
        return web.json_response(text=progress.to_json())
