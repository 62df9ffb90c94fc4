"""A broker of a benchmark's own, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.worker import ROOT, WorkerError
from torch_elastic_mem.broker.paths import BROKER, Paths

# Long enough for any start, and a socket's path is short.
_PREFIX = "tem-bench-"


@contextmanager
def broker(options: Sequence[str] = ()) -> Iterator[tuple[Paths, int]]:
    """Starts `tem serve`, makes it the broker of this process and its children, and ends it.

    Yields:
        Its paths, and its process id.

    Raises:
        WorkerError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder:
        paths = Paths(Path(folder) / "run")
        serve = [sys.executable, "-m", "torch_elastic_mem.cli", "serve", "--directory", str(paths.directory)]
        log = Path(folder) / "log"
        with subprocess.Popen(
            [*serve, "--log", str(log), *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            if "ready" not in process.stdout.readline():
                raise WorkerError(f"the broker ended with code {process.wait()}")
            before = os.environ.get(BROKER)
            os.environ[BROKER] = str(paths.tenants)
            try:
                yield paths, process.pid
            finally:
                if before is None:
                    del os.environ[BROKER]
                else:
                    os.environ[BROKER] = before
                process.terminate()
