"""What would keep the system from working on this machine, and how to mend it. It changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec

import torch_elastic_mem as tem
from torch_elastic_mem.broker import paths
from torch_elastic_mem.broker.control import ControlClient
from torch_elastic_mem.errors import BrokerError, DriverError, DriverMissing, InvalidArgument
from torch_elastic_mem.observe.driver import Driver, look_at_driver

_REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps torch-elastic-mem, where torch is"


class Finding(msgspec.Struct, frozen=True):
    """Something that was looked at.

    Attributes:
        level: "ok"; "note", where something is missing that not everybody needs; "wrong".
        subject: what was looked at.
        says: what was found.
        mend: what to do about it; empty where nothing is to be done.
    """

    level: Literal["ok", "note", "wrong"]
    subject: str
    says: str
    mend: str = ""


def examine(environment: Mapping[str, str], look: Callable[[], Driver] = look_at_driver) -> Iterator[Finding]:
    """Looks at everything, one after the other.

    Args:
        environment: of the process, for where its broker is.
        look: at the driver.
    """
    yield from _package()
    yield from _torch()
    yield from _driver(look)
    yield from _observers()
    yield from _broker(environment)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package() -> Iterator[Finding]:
    yield Finding("ok", "package", f"version {tem.__version__}, Python {platform.python_version()}")
    try:
        import_module("torch_elastic_mem._C")
    except ImportError as error:
        yield Finding(
            "wrong", "core", f"it cannot be loaded: {error}", f"install the package again: {_REINSTALL}"
        )
    else:
        yield Finding("ok", "core", "compiled and loadable")


def _torch() -> Iterator[Finding]:
    # By its metadata: importing it takes seconds and may take a device's memory.
    version = _version("torch")
    if version is None:
        yield Finding("wrong", "torch", "it is not installed", "pip install 'torch>=2.11'")
        return
    yield Finding("ok", "torch", f"version {version}")
    if find_spec("torch_elastic_mem._torch_cuda"):
        yield Finding("ok", "torch extension", "built for CUDA")
    elif find_spec("torch_elastic_mem._torch"):
        yield Finding("ok", "torch extension", "built, without CUDA: a GPU's torch needs it built again")
    else:
        yield Finding("note", "torch extension", "not built: torch's plain C hooks serve", _REINSTALL)


def _driver(look: Callable[[], Driver]) -> Iterator[Finding]:
    try:
        driver = look()
    except DriverMissing as error:
        if Path("/proc/driver/nvidia").exists() or Path("/dev/nvidiactl").exists():
            says = f"there is a device, and no library: {error}"
            yield Finding(
                "wrong", "driver", says, "in a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            )
        else:
            yield Finding("note", "driver", "no NVIDIA driver: only the host backend can be used")
        return
    except DriverError as error:
        mend = "compare nvidia-smi; after an upgrade of the driver, restart the machine"
        yield Finding("wrong", "driver", f"it does not start: {error}", mend)
        return
    yield Finding("ok", "driver", f"CUDA {driver.version}")
    if not driver.gpus:
        yield Finding("note", "device", "the driver shows none", "look at CUDA_VISIBLE_DEVICES")
    for gpu in driver.gpus:
        subject, says = f"device {gpu.uuid}", gpu.name
        if not gpu.vmm:
            mend = "use another device: this one's memory cannot come and go"
            yield Finding("wrong", subject, f"{says}: no virtual memory management", mend)
        elif not gpu.sharing:
            yield Finding(
                "note", subject, f"{says}: virtual memory management, but none to share by descriptors"
            )
        else:
            yield Finding("ok", subject, f"{says}: virtual memory management")


def _observers() -> Iterator[Finding]:
    extra = "pip install 'torch-elastic-mem[broker]'"
    try:
        nvml = import_module("pynvml")
    except ImportError:
        says = "nvidia-ml-py is not installed: a broker cannot see what others hold of a GPU"
        yield Finding("note", "NVML", says, extra)
    else:
        try:
            nvml.nvmlInit()
            yield Finding("ok", "NVML", f"driver {nvml.nvmlSystemGetDriverVersion()}")
        except nvml.NVMLError as error:
            yield Finding("note", "NVML", f"nvidia-ml-py is installed, and finds no driver: {error}")
    if version := _version("prometheus-client"):
        yield Finding("ok", "metrics", f"prometheus-client {version}")
    else:
        yield Finding(
            "note", "metrics", "prometheus-client is not installed: a broker serves no metrics", extra
        )


def _broker(environment: Mapping[str, str]) -> Iterator[Finding]:
    there = paths.Paths(paths.broker_directory(environment))
    if len(os.fsencode(there.tenants)) > paths.LONGEST:
        mend = f"set {paths.DIRECTORY} to a shorter one"
        yield Finding("wrong", "directory", f"{there.tenants} is too long for a socket's path", mend)
        return
    if not os.path.lexists(there.directory):
        yield Finding("note", "directory", f"{there.directory} is not there yet", "tem serve makes it")
        return
    yield _directory(there.directory)
    try:
        with ControlClient(there.control) as client:
            state = client.state()
    except BrokerError as error:
        level: Literal["note", "wrong"] = "wrong" if there.control.exists() else "note"
        yield Finding(level, "broker", str(error))
        return
    if state.version != tem.__version__:
        says = f"pid {state.pid} is of version {state.version}, and this is {tem.__version__}"
        yield Finding("wrong", "broker", says, "restart it: tenants keep what they hold and come back")
    else:
        yield Finding(
            "ok", "broker", f"pid {state.pid}, version {state.version}, {state.clients} connections"
        )
    if not there.tenants.is_socket():
        mend = "restart the broker; whatever cleans up the directory must spare it"
        yield Finding("wrong", "tenants' socket", f"{there.tenants} has been removed", mend)


def _directory(directory: Path) -> Finding:
    owner = os.lstat(directory).st_uid
    try:
        # The broker of another user may be this user's as well, by a group.
        if owner == os.geteuid():
            paths.check(directory, os.lstat(directory).st_gid)
        elif not os.access(directory, os.X_OK):
            mend = "be of the group that the broker's configuration names, and log in anew"
            return Finding("wrong", "directory", f"{directory} of user {owner} may not be entered", mend)
    except InvalidArgument as error:
        return Finding("wrong", "directory", str(error))
    return Finding("ok", "directory", f"{directory} of user {owner}")
