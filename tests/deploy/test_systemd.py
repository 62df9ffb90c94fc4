"""The units in examples/deploy/systemd."""

from __future__ import annotations

import configparser
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.broker.tenant import Tenant
from tests.cli.conftest import runtime as runtime
from torch_elastic_mem.broker.config import Config, merge, read_table
from torch_elastic_mem.broker.control import ControlClient
from torch_elastic_mem.broker.paths import Paths

UNITS = Path(__file__).resolve().parents[2] / "examples/deploy/systemd"
SOCKET, CONTROL, SERVICE = "tem-broker.socket", "tem-broker-control.socket", "tem-broker.service"


def unit(name: str) -> configparser.ConfigParser:
    # Strict: a key that is there twice is an error here, as it would be a surprise there.
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((UNITS / name).read_text())
    return parser


@pytest.mark.parametrize("name", [SOCKET, CONTROL])
def test_others_than_the_group_cannot_connect_nor_write_to_the_directory(name: str) -> None:
    section = unit(name)["Socket"]
    assert int(section["SocketMode"], 8) & 0o007 == 0
    assert int(section["DirectoryMode"], 8) & 0o022 == 0
    assert section["SocketGroup"] == load_broker_toml().group


def test_the_socket_units_listen_where_tenants_and_operators_look() -> None:
    there = Paths(Path("/run/torch_elastic_mem"))
    tenants, control = unit(SOCKET)["Socket"], unit(CONTROL)["Socket"]
    assert tenants["ListenSequentialPacket"] == str(there.tenants)
    assert control["ListenStream"] == str(there.control)
    assert control["Service"] == SERVICE
    assert str(there.directory) in unit(SERVICE)["Service"]["ExecStart"].split()


def load_broker_toml() -> Config:
    return merge(read_table(UNITS / "broker.toml"))


def test_the_broker_takes_the_sockets_that_systemd_gives_it(runtime: Path) -> None:
    """As sd_listen_fds(3) has it: from descriptor 3 on, with the names of the units."""
    listeners = []
    for name, kind, path in (
        (SOCKET, socket.SOCK_SEQPACKET, "tenants.sock"),
        (CONTROL, socket.SOCK_STREAM, "control.sock"),
    ):
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(str(runtime / path))
        listener.listen()
        listeners.append((unit(name)["Socket"]["FileDescriptorName"], listener))
    code = (
        "import os, sys\n"
        "for at, number in enumerate(map(int, sys.argv[1:])): os.dup2(number, 10 + at)\n"
        "for at in range(2): os.dup2(10 + at, 3 + at)\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "from torch_elastic_mem.cli import main\n"
        "main(['serve', '--device', 'HOST=64MiB'])\n"
    )
    numbers = [listener.fileno() for _, listener in listeners]
    environment = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": ":".join(name for name, _ in listeners)}
    started = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, numbers)],
        pass_fds=numbers,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with ControlClient(runtime / "control.sock") as client:
            assert client.state().pid == started.pid
        with Tenant(runtime / "tenants.sock") as tenant:
            assert tenant.welcome.capacity == 64 << 20
    finally:
        started.terminate()
        started.communicate(timeout=20)
    # They are systemd's: the next broker gets them again.
    assert (runtime / "tenants.sock").is_socket() and (runtime / "control.sock").is_socket()
    for _, listener in listeners:
        listener.close()


def test_the_service_says_when_it_is_ready_and_comes_back() -> None:
    service = unit(SERVICE)
    assert service["Service"]["Type"] == "notify"
    assert service["Service"]["ExecStart"].split()[0].endswith("/tem")
    assert service["Service"]["ExecStart"].split()[1] == "serve"
    assert service["Service"]["Restart"] == "on-failure"
    assert service["Unit"]["Requires"].split() == [SOCKET, CONTROL]


def test_the_service_sees_gpus_and_processes_and_may_do_little_else() -> None:
    section = unit(SERVICE)["Service"]
    assert section["DeviceAllow"].startswith("char-nvidia")
    assert "PrivateDevices" not in section and "PrivatePIDs" not in section
    for key in ("NoNewPrivileges", "ProtectHome", "MemoryDenyWriteExecute", "RestrictNamespaces"):
        assert section[key] == "yes"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_finds_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    for name in (SOCKET, CONTROL, SERVICE):
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/local/bin/tem", "/bin/true"))
    done = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            *(str(tmp_path / name) for name in (SOCKET, CONTROL, SERVICE)),
        ],
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if "tem-broker" in line]
    assert said == []
