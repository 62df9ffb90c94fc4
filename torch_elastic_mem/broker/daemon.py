"""A broker as a service: one in a directory, started, reloaded and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import grp
import logging
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_elastic_mem import _C
from torch_elastic_mem.broker import log, systemd
from torch_elastic_mem.broker.broker import Broker
from torch_elastic_mem.broker.config import Config
from torch_elastic_mem.broker.device_view import DeviceView, NoView, Reading, nvml_view
from torch_elastic_mem.broker.paths import Paths, prepare
from torch_elastic_mem.broker.peers import start_tick
from torch_elastic_mem.broker.roster import Key, Roster, lives
from torch_elastic_mem.broker.server import Server
from torch_elastic_mem.errors import InUseError, InvalidArgument, TemError

# How long tenants of a broker that died have to come back before memory that cannot be seen is granted again.
# One that stands still may need all of it; when all have come, they have so long to say what they hold.
GRACE = 10.0
SAYING = 0.5
LOOK_EVERY = 0.1
# Tenants' sockets, and memory on its way from one to another.
DESCRIPTORS = 1 << 16

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Running:
    """A broker that serves, for what is built on top of it.

    Attributes:
        sockets: those that systemd has opened, by name, and nobody has taken.
    """

    broker: Broker
    server: Server
    paths: Paths
    config: Config
    sockets: dict[str, socket.socket] = field(default_factory=dict)


# Something that runs beside the tenants' socket while the broker serves.
Service = Callable[[Running], AbstractAsyncContextManager[object]]


async def run(
    read_config: Callable[[], Config],
    directory: Path,
    *,
    services: Sequence[Service] = (),
    view: DeviceView | None = None,
    ready: Callable[[Running], None] = lambda running: None,
    verbose: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        read_config: reads the configuration, now and at each SIGHUP.
        directory: where the sockets are.
        services: what runs beside, started in order.
        view: of the devices; NVIDIA's where None.
        ready: called once when tenants can connect.
        verbose: log more.
        environment: of systemd.

    Raises:
        InUseError: another broker serves there; the message has its pid.
        InvalidArgument: the configuration or the directory will not do.
        OSError: a socket or the log cannot be opened.
    """
    config = read_config()
    with ExitStack() as stack:
        handler = log.start(config.log, verbose)
        stack.callback(log.stop, handler)
        _raise_descriptors()
        paths = prepare(directory, _group_id(config.group))
        stack.enter_context(_locked(paths.lock))
        sockets = systemd.inherited(environment)
        given = sockets.pop("tenants", None)
        listener = given or listen(paths.tenants, config)
        view = view or nvml_view()
        roster = Roster(paths.directory / "roster")
        awaited = roster.left()
        grace = GRACE if awaited else 0.0
        loop = asyncio.get_running_loop()
        broker = Broker(config, view, grace, start_tick(os.getpid()), loop.time)
        server = Server(broker, listener, roster)
        running = Running(broker, server, paths, config, sockets)
        loop.set_exception_handler(_note_failure)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
            stack.callback(loop.remove_signal_handler, number)
        loop.add_signal_handler(signal.SIGHUP, _reload, running, read_config, handler)
        stack.callback(loop.remove_signal_handler, signal.SIGHUP)
        async with AsyncExitStack() as beside:
            for service in services:
                await beside.enter_async_context(service(running))
            await beside.enter_async_context(_background(_look(running, view)))
            await beside.enter_async_context(_background(_watchdog(environment)))
            await beside.enter_async_context(_background(_await_tenants(running, awaited)))
            logger.info("serving at %s as process %d, epoch %d", paths.tenants, os.getpid(), broker.epoch)
            systemd.notify(environment, "READY=1")
            ready(running)
            await stop.wait()
            logger.info("stopping")
            systemd.notify(environment, "STOPPING=1")
        server.close()
        # What systemd has opened it gives to the next broker.
        if given is None:
            paths.tenants.unlink(missing_ok=True)


def listen(path: Path, config: Config) -> socket.socket:
    """Opens a socket for tenants, in the place of one that a broker has left behind.

    The caller has the directory's lock, so nobody serves there.

    Raises:
        OSError: it cannot be opened.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        listener.bind(os.fspath(path))
        group = _group_id(config.group)
        if group is not None:
            os.chown(path, -1, group)
        os.chmod(path, 0o600 if group is None else 0o660)
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 256, 0).decode(errors="replace").strip() or "unknown"
            raise InUseError(
                f"another broker serves in {path.parent}: process {pid}; stop it, or give this one "
                f"another directory"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextlib.asynccontextmanager
async def _background(work: AsyncIterator[None]) -> AsyncIterator[None]:
    async def drive() -> None:
        async for _ in work:
            pass

    def say(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.error("a part of the broker has ended", exc_info=task.exception())

    task = asyncio.create_task(drive())
    task.add_done_callback(say)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _look(running: Running, view: DeviceView) -> AsyncIterator[None]:
    """Looks at the devices ten times a second, in a thread: a driver may take its time."""
    if isinstance(view, NoView):
        return
    loop = asyncio.get_running_loop()

    def read(uuids: list[str]) -> dict[str, Reading]:
        found = {uuid: view.read(uuid) for uuid in uuids}
        return {uuid: reading for uuid, reading in found.items() if reading is not None}

    while True:
        if uuids := running.broker.visible():
            readings = await loop.run_in_executor(None, read, uuids)
            with running.server.turn():
                running.broker.look(readings)
        await asyncio.sleep(LOOK_EVERY)
        yield


async def _await_tenants(running: Running, awaited: set[Key]) -> AsyncIterator[None]:
    """Ends the grace when all tenants of the last broker have connected, or are gone."""
    while awaited:
        awaited = {key for key in awaited if lives(key) and not running.server.knows(*key)}
        if not awaited:
            with running.server.turn():
                running.broker.end_grace(SAYING)
        await asyncio.sleep(LOOK_EVERY / 2)
        yield


async def _watchdog(environment: Mapping[str, str]) -> AsyncIterator[None]:
    seconds = systemd.watchdog_seconds(environment)
    while seconds is not None:
        systemd.notify(environment, "WATCHDOG=1")
        await asyncio.sleep(seconds)
        yield


def _note_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Something in the broker's own loop went wrong. It is said, and the others are served."""
    logger.error("%s", context["message"], exc_info=context.get("exception"))


def _reload(running: Running, read_config: Callable[[], Config], handler: log.CountingHandler) -> None:
    """Takes the configuration anew; one that will not do changes nothing."""
    try:
        config = read_config()
        with running.server.turn():
            running.broker.configure(config)
        running.config = config
        if isinstance(handler, log.CountingFile):
            handler.reopen()
    except (TemError, OSError) as error:
        logger.error("the configuration was not taken: %s", error)
        return
    logger.info("took the configuration")


def _group_id(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise InvalidArgument(f"no group '{name}' on this machine; create it, or leave `group` out") from None


def _raise_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # A lower limit holds fewer tenants, and the server lives with that.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    # While there is no thread yet, and so nothing to wait for.
    _C.widen_descriptor_table(DESCRIPTORS)
