"""A broker for tests: `python -m tests.shared.serve DIRECTORY [FILES]`.

A line of stdin asks for the state of a device, by its UUID; an empty one, of that which came last.
FILES is how many descriptors it may open.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from torch_elastic_mem.broker.config import Config, merge
from torch_elastic_mem.broker.daemon import Running, run
from torch_elastic_mem.broker.device_view import NoView
from torch_elastic_mem.broker.shares_server import serve_shares


def say(value: object) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


@asynccontextmanager
async def telling(running: Running) -> AsyncIterator[None]:
    def asked() -> None:
        if line := sys.stdin.readline():
            devices = running.broker.state().devices
            say(next((each for each in reversed(devices) if line.strip() in ("", each.uuid)), None))
        else:
            asyncio.get_running_loop().remove_reader(sys.stdin)

    asyncio.get_running_loop().add_reader(sys.stdin, asked)
    yield


def config() -> Config:
    return merge({}, capacities=("HOST=1GiB",), reserves=(), metrics=None, log=None)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
    asyncio.run(
        run(
            config,
            Path(sys.argv[1]),
            services=(serve_shares, telling),
            view=NoView(),
            ready=lambda running: say("ready"),
        )
    )
