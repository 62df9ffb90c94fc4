"""The units in examples/deploy/systemd."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from torch_elastic_mem.broker.paths import Paths

UNITS = Path(__file__).resolve().parents[2] / "examples/deploy/systemd"
SOCKET, SERVICE = "tem-broker.socket", "tem-broker.service"


def unit(name: str) -> configparser.ConfigParser:
    # Strict: a key that is there twice is an error here, as it would be a surprise there.
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((UNITS / name).read_text())
    return parser


def test_the_socket_unit_listens_where_tenants_and_operators_look() -> None:
    there = Paths(Path("/run/torch_elastic_mem"))
    section = unit(SOCKET)["Socket"]
    assert section["ListenSequentialPacket"] == str(there.tenants)
    assert section["ListenStream"] == str(there.control)


def test_others_than_the_group_cannot_connect_nor_write_to_the_directory() -> None:
    section = unit(SOCKET)["Socket"]
    assert int(section["SocketMode"], 8) & 0o007 == 0
    assert int(section["DirectoryMode"], 8) & 0o022 == 0


def test_the_service_says_when_it_is_ready_and_comes_back() -> None:
    service = unit(SERVICE)
    assert service["Service"]["Type"] == "notify"
    assert service["Service"]["ExecStart"].split()[0].endswith("/tem")
    assert service["Service"]["ExecStart"].split()[1] == "serve"
    assert service["Service"]["Restart"] == "on-failure"
    assert service["Unit"]["Requires"] == SOCKET


def test_the_service_sees_gpus_and_processes_and_may_do_little_else() -> None:
    section = unit(SERVICE)["Service"]
    assert section["DeviceAllow"].startswith("char-nvidia")
    assert "PrivateDevices" not in section and "PrivatePIDs" not in section
    for key in ("NoNewPrivileges", "ProtectHome", "MemoryDenyWriteExecute", "RestrictNamespaces"):
        assert section[key] == "yes"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_finds_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    for name in (SOCKET, SERVICE):
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/local/bin/tem", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / SOCKET), str(tmp_path / SERVICE)],
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if "tem-broker" in line]
    assert said == []
