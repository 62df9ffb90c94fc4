"""The broker's log: lines of JSON, which a full disk costs and nothing else."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec


class JsonLines(logging.Formatter):
    """A record as a line of JSON: time in seconds since 1970, level, logger, message, a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class CountingHandler(logging.StreamHandler):  # type: ignore[type-arg]  # subscripted, it is no class at run time
    """Writes lines, and counts those that could not be written.

    Attributes:
        dropped: how many.
    """

    dropped = 0

    def handleError(self, record: logging.LogRecord) -> None:
        """A line that could not be written is counted."""
        self.dropped += 1


class CountingFile(CountingHandler):
    """The same into a file, opened anew when it was moved away or could not be opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(None)
        self.reopen()

    def reopen(self) -> None:
        """Opens the file again, as after it was rotated."""
        previous = getattr(self, "_file", None)
        # Unbuffered by line: what a full disk refuses is not kept for the next line.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  (it stays open)
        if previous is not None:
            previous.close()

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        try:
            self._file.write((self.format(record) + "\n").encode())
        except (OSError, ValueError):
            self.handleError(record)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()


def start(path: str | None, verbose: bool = False) -> CountingHandler:
    """Sends the package's log to a file, or to the standard error.

    Raises:
        OSError: the file cannot be opened.
    """
    handler = CountingHandler(sys.stderr) if path is None else CountingFile(Path(path))
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("torch_elastic_mem")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    return handler


def stop(handler: CountingHandler) -> None:
    """Takes a handler of `start` away."""
    logging.getLogger("torch_elastic_mem").removeHandler(handler)
    handler.close()
