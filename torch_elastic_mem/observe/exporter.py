"""Metrics over HTTP, from a thread beside the broker's loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from torch_elastic_mem.broker.control_server import Operated
from torch_elastic_mem.broker.state import Event, MachineState
from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.observe.metrics import Collector

if TYPE_CHECKING:
    from torch_elastic_mem.broker.daemon import Running

# A loop that is busy for longer has the scrape fail rather than pile up.
_READ_SECONDS = 5.0


class Observed(Protocol):
    """What is read of a broker, on its loop's thread."""

    def state(self) -> MachineState:
        """The broker at this moment."""

    def events(self, since: int) -> list[Event]:
        """Those after number `since` that it still has, oldest first."""


@contextlib.asynccontextmanager
async def metrics(running: Running) -> AsyncIterator[None]:
    """A service of the daemon: metrics at the port that its configuration names, if it names one."""
    if running.config.metrics is None:
        yield
        return
    loop = asyncio.get_running_loop()
    broker = Operated(running.broker, running.server.turn)
    close = serve_metrics(broker, loop, running.config.metrics)
    try:
        yield
    finally:
        # A scrape may wait for this loop, and the server for the scrape.
        await loop.run_in_executor(None, close)


def serve_metrics(
    broker: Observed, loop: asyncio.AbstractEventLoop, port: int, address: str = "127.0.0.1"
) -> Callable[[], None]:
    """Serves /metrics until the function that it returns is called.

    Args:
        broker: what is shown; it is read on its loop's thread alone.
        loop: on which `broker` lives; it runs, or will.
        port: of TCP; 0 for any.
        address: to listen at.

    Raises:
        InvalidArgument: the port is taken or not allowed, or prometheus_client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise InvalidArgument(
            "metrics need prometheus-client: pip install 'torch-elastic-mem[broker]', or configure no port"
        ) from None

    def read(since: int) -> tuple[MachineState, list[Event]]:
        taken: Future[tuple[MachineState, list[Event]]] = Future()

        def take() -> None:
            # A scrape that gave up has cancelled it.
            if not taken.set_running_or_notify_cancel():
                return
            try:
                taken.set_result((broker.state(), broker.events(since)))
            except Exception as error:  # noqa: BLE001  (it is the scrape's, whatever it is)
                taken.set_exception(error)

        loop.call_soon_threadsafe(take)
        try:
            return taken.result(_READ_SECONDS)
        finally:
            taken.cancel()

    registry = CollectorRegistry()
    registry.register(Collector(read))
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise InvalidArgument(
            f"metrics cannot be served at {address}:{port} ({error.strerror}): configure another port"
        ) from None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close
