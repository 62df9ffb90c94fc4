"""The configuration that a broker would have, value by value, and where each comes from."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from torch_elastic_mem.broker import paths
from torch_elastic_mem.broker.config import Config, load

Source = Literal["default", "file", "environment", "flag"]


class Setting(msgspec.Struct, frozen=True):
    """A value in force.

    Attributes:
        key: as in the file, such as `device."HOST".capacity`.
        value: as JSON has it; None is "none".
        source: what decided it.
        where: the variable, flag or file; empty for a default.
    """

    key: str
    value: Any
    source: Source
    where: str = ""


def effective(environment: Mapping[str, str], file: Path | None, flag: str = "--config") -> list[Setting]:
    """What is in force with an environment and a file.

    Args:
        environment: of the process.
        file: the configuration; None for none.
        flag: that named the file.

    Raises:
        InvalidArgument: the file cannot be read, or says something unknown or impossible.
    """
    config = load(file) if file else Config()
    raw = tomllib.loads(file.read_text()) if file else {}
    found = [_directory(environment), _socket(environment)]
    found.append(Setting("config", str(file), "flag", flag) if file else Setting("config", None, "default"))
    for field, value in msgspec.to_builtins(config).items():
        found += _flat(field, value, raw.get(field), str(file))
    return found


def _directory(environment: Mapping[str, str]) -> Setting:
    value = str(paths.default_directory(environment))
    for variable in (paths.DIRECTORY, "XDG_RUNTIME_DIR"):
        if environment.get(variable):
            return Setting("directory", value, "environment", variable)
    return Setting("directory", value, "default")


def _socket(environment: Mapping[str, str]) -> Setting:
    """The socket that tenants with this environment look for, which need not be in the directory."""
    value = str(paths.tenants_socket(environment))
    if environment.get(paths.BROKER):
        return Setting("broker", value, "environment", paths.BROKER)
    directory = _directory(environment)
    return Setting("broker", value, directory.source, directory.where)


def _flat(key: str, value: Any, given: Any, file: str) -> Iterator[Setting]:
    """A value by its parts. TOML has no null, so what is None in the file's table is not there."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            inner = f'{key}."{name}"' if key == "device" else f"{key}.{name}"
            yield from _flat(inner, part, (given or {}).get(name), file)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        for number, part in enumerate(value):
            yield from _flat(f"{key}[{number}]", part, given[number], file)
    elif given is None:
        yield Setting(key, value, "default")
    else:
        yield Setting(key, value, "file", file)
