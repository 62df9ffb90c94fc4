"""Where a broker and its tenants meet: the directory, who may own it, and the names in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch_elastic_mem.errors import InvalidArgument

DIRECTORY = "TEM_RUNTIME_DIR"
BROKER = "TEM_BROKER"
# What the kernel takes for the path of a socket, its end included.
LONGEST = 107


@dataclass(frozen=True, slots=True)
class Paths:
    """The files of a broker's directory."""

    directory: Path

    @property
    def tenants(self) -> Path:
        """The socket that tenants connect to."""
        return self.directory / "tenants.sock"

    @property
    def control(self) -> Path:
        """The socket for operators."""
        return self.directory / "control.sock"

    @property
    def shares(self) -> Path:
        """The socket for memory that several processes map."""
        return self.directory / "shares.sock"

    @property
    def lock(self) -> Path:
        """The file that the broker which serves here has locked."""
        return self.directory / "broker.lock"


def default_directory(environment: Mapping[str, str], uid: int | None = None) -> Path:
    """The directory that a process of the user meets its broker in, by the rules of docs/protocol.md."""
    uid = os.geteuid() if uid is None else uid
    if given := environment.get(DIRECTORY):
        return Path(given)
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "torch_elastic_mem"
    return Path("/run/torch_elastic_mem") if uid == 0 else Path(f"/tmp/torch_elastic_mem-{uid}")


def tenants_socket(environment: Mapping[str, str]) -> Path | None:
    """The socket that a tenant connects to: what TEM_BROKER says, else that of the default directory.

    None where TEM_BROKER is empty or 0: there is to be no broker.
    """
    given = environment.get(BROKER)
    if given is None:
        return Paths(default_directory(environment)).tenants
    return None if given in ("", "0") else Path(given)


def broker_directory(environment: Mapping[str, str]) -> Path:
    """Where the broker is that the programs of this environment have, or would have if they wanted one."""
    tenants = tenants_socket(environment)
    return default_directory(environment) if tenants is None else tenants.parent


def prepare(directory: Path, group: int | None = None) -> Paths:
    """Makes the directory for a broker of this user, or takes the one that is there.

    Args:
        directory: where; its parents are made too.
        group: the id of a group that may enter as well.

    Returns:
        The paths in it.

    Raises:
        InvalidArgument: it is no directory of this user's, others may write to it, or its name is too long
            for a socket's.
        OSError: it cannot be made.
    """
    paths = Paths(directory)
    if len(os.fsencode(paths.tenants)) > LONGEST:
        raise InvalidArgument(
            f"{paths.tenants} is too long for a socket's path; set {DIRECTORY} to a shorter one"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        check(directory, group)
    if group is not None:
        os.chown(directory, -1, group)
    os.chmod(directory, 0o700 if group is None else 0o750)
    return paths


def check(directory: Path, group: int | None = None) -> None:
    """Refuses a directory in which others could have put a socket of theirs.

    Raises:
        InvalidArgument: as the message says.
    """
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise InvalidArgument(f"{directory} is no directory; remove it, or set {DIRECTORY} to another place")
    if found.st_uid != os.geteuid():
        raise InvalidArgument(
            f"{directory} belongs to user {found.st_uid}, not {os.geteuid()}; set {DIRECTORY} to "
            f"one of your own"
        )
    by_group = found.st_mode & stat.S_IWGRP and found.st_gid not in (group, found.st_uid, os.getegid())
    if found.st_mode & stat.S_IWOTH or by_group:
        raise InvalidArgument(
            f"others may write to {directory} (mode {stat.S_IMODE(found.st_mode):04o}); run chmod 0700 "
            f"{directory}"
        )
