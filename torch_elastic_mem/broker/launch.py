"""Starts a broker as a process of its own, and waits until tenants can connect."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch_elastic_mem.broker.paths import LONGEST, Paths, prepare
from torch_elastic_mem.errors import BrokerError

# Python's start and ours take a few tenths of that; a machine may be busy.
_START_SECONDS = 20.0
_TAIL = 2000
# A manager's words to whoever started the broker are not for the broker.
_OF_SYSTEMD = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def connected(path: Path) -> socket.socket | None:
    """A connection to the tenants' socket at a path; None where nobody listens.

    Raises:
        BrokerError: it may not be connected to.
    """
    if len(os.fsencode(path)) > LONGEST:
        return None  # nor can anybody
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        made.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError):
        made.close()
        return None
    except OSError as error:
        made.close()
        raise BrokerError(f"the broker's socket {path} cannot be connected to: {error.strerror}") from None
    return made


def ensure(directory: Path, options: Sequence[str]) -> tuple[socket.socket, bool]:
    """Connects to the broker in a directory, and starts one that outlives this process if there is none.

    Of several processes that call this at once, one starts it.

    Args:
        directory: where the broker is to be.
        options: of `tem serve`, for one that is started.

    Returns:
        The connection, and whether a broker was started.

    Raises:
        BrokerError: there is none, and it did not start. InvalidArgument: the directory will not do.
        OSError: the directory cannot be made.
    """
    paths = Paths(directory)
    if found := connected(paths.tenants):
        return found, False
    prepare(directory)
    with _turn(directory / "start.lock"):
        if found := connected(paths.tenants):
            return found, False
        log = directory / "broker.log"
        with _Readiness(log) as readiness:
            # Through a process that ends at once: the program that this process becomes has no child it does
            # not know of, and the broker no parent that it outlives.
            between = os.fork()
            if between == 0:
                try:
                    _spawn(directory, options, readiness)
                finally:
                    os._exit(0)
            os.waitpid(between, 0)
            readiness.wait(directory)
        made = connected(paths.tenants)
        if made is None:
            raise BrokerError(f"the broker in {directory} ended as soon as it was ready; {log} says why")
        return made, True


def launch(directory: Path, options: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a broker as a child of this process, and returns when tenants can connect.

    Raises:
        BrokerError: it did not start.
    """
    with _Readiness(log) as readiness:
        process = _spawn(directory, options, readiness)
        try:
            readiness.wait(directory)
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process


class _Readiness:
    """How a broker that is being started is heard of: as systemd hears of it, and by the end of a pipe."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._logged = log.stat().st_size if log.exists() else 0
        self.address = f"@tem-{os.getpid()}-{secrets.token_hex(8)}"
        self._told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._told.bind(self.address.replace("@", "\0", 1))
        self._ended, self.alive = os.pipe()

    def __enter__(self) -> _Readiness:
        return self

    def __exit__(self, *_: object) -> None:
        self._told.close()
        os.close(self._ended)
        self._let_go()

    def _let_go(self) -> None:
        if self.alive >= 0:
            os.close(self.alive)
            self.alive = -1

    def wait(self, directory: Path) -> None:
        """Returns when the broker is ready.

        Raises:
            BrokerError: it has ended, or takes too long.
        """
        self._let_go()
        end = time.monotonic() + _START_SECONDS
        while (left := end - time.monotonic()) > 0:
            heard = select.select([self._told.fileno(), self._ended], [], [], left)[0]
            if self._told.fileno() in heard:
                if b"READY=1" in self._told.recv(4096).split(b"\n"):
                    return
            elif heard:
                break
        why = "ended" if left > 0 else f"was not ready after {_START_SECONDS:g} s"
        raise BrokerError(f"a broker was started in {directory} and {why}; it said: {self._words()}")

    def _words(self) -> str:
        try:
            said = self.log.read_bytes()[self._logged :].decode(errors="replace").strip()
        except OSError:
            said = ""
        return said[-_TAIL:] or "nothing"


def _spawn(directory: Path, options: Sequence[str], readiness: _Readiness) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name not in _OF_SYSTEMD}
    environment["NOTIFY_SOCKET"] = readiness.address
    command = [
        sys.executable,
        "-m",
        "torch_elastic_mem.cli",
        "serve",
        "--directory",
        str(directory.absolute()),
    ]
    descriptor = os.open(
        readiness.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        return subprocess.Popen(
            [*command, *options],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            # Where -m finds this package; and the program's folder is not kept busy.
            cwd=Path(__file__).resolve().parents[2],
            env=environment,
            pass_fds=[readiness.alive],
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
