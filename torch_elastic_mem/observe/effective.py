"""The configuration that a broker would have, value by value, and where each comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from torch_elastic_mem.broker import paths
from torch_elastic_mem.broker.config import merge, read_table
from torch_elastic_mem.errors import InvalidArgument

Source = Literal["default", "file", "environment", "flag"]
Place = tuple[str | int, ...]

# The options of `tem serve`, by the last part of what they set.
_FLAGS = {"capacity": "--device", "reserve": "--reserve", "metrics": "--metrics", "log": "--log"}


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


def effective(
    environment: Mapping[str, str], file: Path | None, directory: Path | None, **options: Any
) -> list[Setting]:
    """What is in force with an environment, a file and what the command line says over them.

    Args:
        environment: of the process.
        file: the configuration; None for none.
        directory: that an option names; None for the default one.
        options: as for `broker.config.merge`.

    Raises:
        InvalidArgument: the file cannot be read, or something is unknown or impossible.
    """
    table = {} if file is None else read_table(file)
    flags = msgspec.to_builtins(merge({}, **options))
    try:
        config = msgspec.to_builtins(merge(table, **options))
    except InvalidArgument as error:
        raise InvalidArgument(f"{file}: {error}") from None
    found = [_directory(environment, directory), _socket(environment)]
    found.append(Setting("config", str(file), "flag", "--config") if file else _default("config"))
    for path, value in _leaves(config, ()):
        if _at(flags, path) not in (None, (), {}):
            found.append(Setting(_key(path), value, "flag", _FLAGS[str(path[-1])]))
        elif _at(table, path) is not None:
            found.append(Setting(_key(path), value, "file", str(file)))
        else:
            found.append(_default(_key(path), value))
    return found


def _default(key: str, value: Any = None) -> Setting:
    return Setting(key, value, "default")


def _directory(environment: Mapping[str, str], given: Path | None = None) -> Setting:
    if given:
        return Setting("directory", str(given.absolute()), "flag", "--directory")
    value = str(paths.default_directory(environment))
    for variable in (paths.DIRECTORY, "XDG_RUNTIME_DIR"):
        if environment.get(variable):
            return Setting("directory", value, "environment", variable)
    return _default("directory", value)


def _socket(environment: Mapping[str, str]) -> Setting:
    """The socket that tenants with this environment look for, which need not be in the directory."""
    found = paths.tenants_socket(environment)
    value = None if found is None else str(found)
    if paths.BROKER in environment:
        return Setting("tenants look at", value, "environment", paths.BROKER)
    directory = _directory(environment)
    return Setting("tenants look at", value, directory.source, directory.where)


def _leaves(value: Any, path: Place) -> Iterator[tuple[Place, Any]]:
    """The values of nested tables, and where they are. A list of what is no table is one value."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _leaves(part, (*path, name))
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        for number, part in enumerate(value):
            yield from _leaves(part, (*path, number))
    else:
        yield path, value


def _at(table: Any, path: Place) -> Any:
    """What a table has there; None for nothing, which TOML cannot say otherwise."""
    for step in path:
        try:
            table = table[step]
        except (KeyError, IndexError):
            return None
    return table


def _key(path: Place) -> str:
    written = ""
    for position, step in enumerate(path):
        if isinstance(step, int):
            written += f"[{step}]"
        elif position == 1 and path[0] == "device":
            written += f'."{step}"'
        else:
            written += f".{step}" if position else step
    return written
