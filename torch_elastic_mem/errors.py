"""Every exception that the package raises. Each also is the built-in that a caller would expect."""

from __future__ import annotations


class TemError(Exception):
    """The root of the tree. A message says what was asked, what was free, who holds the rest, what to do."""


class InvalidArgument(TemError, ValueError):
    """A value that can never be right: a negative size, an unknown class, a device that does not exist."""


class BlockError(InvalidArgument):
    """A KV block out of range, or released while it was not held. Nothing was changed."""


class AdmissionError(InvalidArgument):
    """A `min` that does not fit beside those promised. The account was not opened, or keeps its limits."""


class OutOfMemory(TemError, MemoryError):
    """Memory that could not be had within the time allowed. Everything is as it was before the call."""


class DriverError(TemError, RuntimeError):
    """The driver refused a call.

    Attributes:
        code: the driver's error number, a CUresult on the CUDA backend.
    """

    def __init__(self, message: str = "", code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class DriverMissing(DriverError):
    """There is no driver, it is too old, or the device has no virtual memory management."""


class ClosedError(TemError, RuntimeError):
    """An arena, an account or a tensor used after it was closed."""


class InUseError(TemError, RuntimeError):
    """Something was closed while tensors or allocations still live in it. It stays open."""


class ForkedError(TemError, RuntimeError):
    """An arena used in a child of fork(): device memory and addresses stay with the parent."""


class NotResident(TemError, RuntimeError):
    """A block was touched, in debug mode, that has no memory behind it."""


class BrokerError(TemError, ConnectionError):
    """There is no broker to speak with, it refused, or it broke off. Nothing is known to have changed."""
