"""What CUDA's driver says of itself and its devices, asked without making a context on any."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from torch_elastic_mem.errors import DriverError, DriverMissing

LIBRARY = "libcuda.so.1"

_NO_DEVICE = 100
_VMM_SUPPORTED = 102
_FD_SUPPORTED = 103


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device as the driver sees it.

    Attributes:
        uuid: in the form of nvidia-smi, "GPU-...". name: for people.
        vmm: whether it has virtual memory management. sharing: whether its memory can go to other processes.
    """

    uuid: str
    name: str
    vmm: bool
    sharing: bool


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver: the CUDA version it speaks, such as "13.0", and what devices it shows this process."""

    version: str
    gpus: tuple[Gpu, ...]


def look_at_driver(library: str = LIBRARY) -> Driver:
    """Asks the driver. Takes no memory of a device, for it makes no context.

    Raises:
        DriverMissing: there is no such library.
        DriverError: it refuses to start, as after an upgrade without a reload of its module.
    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        raise DriverMissing(str(error)) from None

    def ask(function: str, *arguments: object) -> None:
        entry = getattr(cuda, function, None)
        if entry is None:
            raise DriverError(f"it is too old: it has no {function}")
        code = entry(*arguments)
        if code != 0:
            raise DriverError(f"{function} failed with {code}", code)

    version, count = ctypes.c_int(), ctypes.c_int()
    ask("cuDriverGetVersion", ctypes.byref(version))
    spoken = f"{version.value // 1000}.{version.value % 1000 // 10}"
    try:
        ask("cuInit", 0)
        ask("cuDeviceGetCount", ctypes.byref(count))
    except DriverError as error:
        if error.code == _NO_DEVICE:
            return Driver(spoken, ())
        raise
    return Driver(spoken, tuple(_gpu(ask, ordinal) for ordinal in range(count.value)))


def _gpu(ask: Callable[..., None], ordinal: int) -> Gpu:
    device = ctypes.c_int()
    ask("cuDeviceGet", ctypes.byref(device), ordinal)
    name, uuid = ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
    ask("cuDeviceGetName", name, len(name), device)
    ask("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)

    def has(attribute: int) -> bool:
        value = ctypes.c_int()
        ask("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return bool(value.value)

    text = name.value.decode(errors="replace")
    return Gpu(f"GPU-{UUID(bytes=bytes(uuid))}", text, has(_VMM_SUPPORTED), has(_FD_SUPPORTED))
