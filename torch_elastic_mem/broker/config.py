"""What the operator wants of a broker: a file of TOML, or nothing."""

from __future__ import annotations

import difflib
import os
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from torch_elastic_mem.broker.protocol import HOST
from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.priority import HIGHEST_VALUE
from torch_elastic_mem.units import format_bytes, parse_bytes

Size = int | str
_RESERVES: dict[str, tuple[int, int]] = {"host": (64 << 20, 256 << 20), "cuda": (256 << 20, 1 << 30)}


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a device is shared out.

    Attributes:
        capacity: bytes, the reserve included; None for all of a GPU, and half of the machine's memory.
        reserve: the two marks; None for what suits the device. See `DeviceState`.
    """

    capacity: Size | None = None
    reserve: tuple[Size, Size] | None = None

    def capacity_of(self, device: str, total: int) -> int:
        """Bytes of a device that has `total`."""
        if self.capacity is None:
            return total // 2 if device == HOST else total
        return min(total, parse_bytes(self.capacity))

    def reserve_of(self, backend: str, capacity: int) -> tuple[int, int]:
        """The two marks, in bytes: those given, else of what suits the device at most an eighth of it."""
        if self.reserve is not None:
            return parse_bytes(self.reserve[0]), parse_bytes(self.reserve[1])
        low, high = _RESERVES.get(backend, _RESERVES["cuda"])
        return min(low, capacity // 32), min(high, capacity // 8)


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the processes of a user may ask for.

    Attributes:
        uid: the user. max_value: the highest value of a class. max_min: bytes that may be promised to
            an account. connections: at one time.
    """

    uid: int
    max_value: int = 100
    max_min: Size = 0
    connections: int = 64


class LimitsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Limits that the operator sets for accounts, whatever their process asks for. What is not given stays.

    Attributes:
        name: of the accounts, or "name/pid", or the name of a class. device: its UUID or label; None for all.
        priority: the name of another class. value: its value.
    """

    name: str
    device: str | None = None
    priority: str | None = None
    value: int | None = None
    min: Size | None = None
    low: Size | None = None
    high: Size | None = None
    max: Size | None = None
    weight: float | None = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A broker's configuration. Every field has a default.

    Attributes:
        device: by UUID, label or "HOST". grant: by user. limits: of accounts; where two say the same of one,
            the later counts.
        group: a group, by name, that may connect too. log: a file for the log, in lines of JSON; None for the
            standard error. metrics: a port of the machine's own address for metrics; None for none.
    """

    device: dict[str, DeviceConfig] = {}
    grant: tuple[Grant, ...] = ()
    limits: tuple[LimitsConfig, ...] = ()
    group: str | None = None
    log: str | None = None
    metrics: int | None = None

    def device_of(self, *names: str) -> DeviceConfig:
        """What is said of the device with one of these names."""
        return next((self.device[name] for name in names if name in self.device), DeviceConfig())

    def grant_of(self, uid: int) -> Grant:
        """What a user may ask for. Root and the broker's own may all, unless the file says less."""
        for grant in self.grant:
            if grant.uid == uid:
                return grant
        if uid in (0, os.geteuid()):
            return Grant(uid, max_value=HIGHEST_VALUE, max_min=2**63 - 1, connections=4096)
        return Grant(uid)


def read_table(path: Path) -> dict[str, Any]:
    """Reads a file of TOML.

    Raises:
        InvalidArgument: it cannot be read, or is none.
    """
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}") from None


def merge(
    table: dict[str, Any],
    *,
    capacities: Sequence[str] = (),
    reserves: Sequence[str] = (),
    metrics: int | None = None,
    log: str | None = None,
) -> Config:
    """A file's table with what the command line says over it.

    Args:
        table: of the file.
        capacities: "HOST=4GiB".
        reserves: "HOST=64MiB,256MiB".
        metrics: as in `Config`.
        log: likewise.

    Raises:
        InvalidArgument: as for `parse`, or an option is not of that form.
    """
    table = dict(table)
    devices = {name: dict(device) for name, device in dict(table.get("device", {})).items()}
    for text in capacities:
        name, size = _pair(text, "HOST=4GiB")
        devices.setdefault(name, {})["capacity"] = size
    for text in reserves:
        name, sizes = _pair(text, "HOST=64MiB,256MiB")
        devices.setdefault(name, {})["reserve"] = sizes.split(",")
    given = {"device": devices or None, "metrics": metrics, "log": log}
    return parse(table | {key: value for key, value in given.items() if value is not None})


def _pair(text: str, example: str) -> tuple[str, str]:
    name, equals, rest = text.rpartition("=")
    if not equals or not name:
        raise InvalidArgument(f"'{text}' is not of the form {example}")
    return name, rest


def parse(table: dict[str, Any]) -> Config:
    """Makes a configuration of a table, and checks it.

    Raises:
        InvalidArgument: a key is unknown, or a value impossible.
    """
    _check_keys(table, Config, "")
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise InvalidArgument(str(error)) from None
    for name, device in config.device.items():
        _check_device(name, device)
    for grant in config.grant:
        parse_bytes(grant.max_min)
    for limits in config.limits:
        for size in (limits.min, limits.low, limits.high, limits.max):
            if size is not None:
                parse_bytes(size)
    return config


def _check_device(name: str, device: DeviceConfig) -> None:
    capacity = None if device.capacity is None else parse_bytes(device.capacity)
    if device.reserve is None:
        if capacity == 0:
            raise InvalidArgument(f'device."{name}": capacity is zero bytes; give it something to share')
        return
    low, high = (parse_bytes(size) for size in device.reserve)
    if low > high:
        raise InvalidArgument(
            f'device."{name}": reserve {list(device.reserve)} must be [low, high] with low <= high'
        )
    if capacity is not None and high >= capacity:
        raise InvalidArgument(
            f'device."{name}": reserve {format_bytes(high)} leaves nothing of capacity '
            f"{format_bytes(capacity)}; lower it"
        )


def _check_keys(value: Any, kind: Any, where: str) -> None:
    """Msgspec says that a key is unknown; this says which one was meant."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next((each for each in typing.get_args(kind) if each is not types.NoneType), kind)
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        for key, each in value.items():
            _check_keys(each, inner[1], f'{where}."{key}"')
    elif typing.get_origin(kind) is tuple and isinstance(value, list):
        for each in value:
            _check_keys(each, inner[0], where)
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        for key, each in value.items():
            if key not in hints:
                close = difflib.get_close_matches(key, hints, 1)
                hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(hints)}"
                raise InvalidArgument(
                    f"unknown key '{key}'{f' in {where[1:] or where}' if where else ''}; {hint}"
                )
            _check_keys(each, hints[key], f"{where}.{key}")


def memory_of_the_machine() -> int:
    """Bytes of memory that the kernel has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
