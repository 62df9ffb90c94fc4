"""A broker that nobody needs any more ends by itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_elastic_mem.broker.daemon import Running

logger = logging.getLogger(__name__)


def idle_exit(seconds: float) -> Callable[[Running], AbstractAsyncContextManager[None]]:
    """A service of the daemon: stops it once it has had no tenant for so many seconds.

    Whoever is connected is a tenant, and so is a process whose connection has gone while it holds memory.
    """

    @contextlib.asynccontextmanager
    async def service(running: Running) -> AsyncIterator[None]:
        task = asyncio.create_task(_watch(running, seconds))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    return service


async def _watch(running: Running, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    used = loop.time()
    while True:
        await asyncio.sleep(min(1.0, seconds / 4))
        with running.server.turn():
            held = any(books.accounts.holders for books in running.broker.books.values())
        if running.server.connections or held:
            used = loop.time()
        elif loop.time() - used >= seconds:
            logger.info("no tenant for %g s", seconds)
            os.kill(os.getpid(), signal.SIGTERM)
            return
