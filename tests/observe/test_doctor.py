from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

import torch_elastic_mem as tem
from tests.broker.controlled import Control
from tests.cli.conftest import control as control
from tests.cli.conftest import runtime as runtime
from torch_elastic_mem.cli import main
from torch_elastic_mem.observe.doctor import Finding, examine
from torch_elastic_mem.observe.driver import Driver, Gpu, look_at_driver

GPU = Gpu("GPU-1", "H100", vmm=True, sharing=True)


def found(look: object = None, **environment: str) -> dict[str, Finding]:
    def no_driver() -> Driver:
        raise tem.DriverMissing("no libcuda.so.1")

    chosen = look if callable(look) else no_driver
    findings = list(examine(os.environ | environment, chosen))
    assert all(
        finding.mend or finding.level != "wrong" or "run chmod" in finding.says or "tem serve" in finding.says
        for finding in findings
    )
    return {finding.subject: finding for finding in findings}


def test_the_driver_is_asked_without_a_context_on_any_device(fake_library: Path) -> None:
    driver = look_at_driver(str(fake_library))
    assert driver.gpus and all(gpu.vmm and gpu.uuid.startswith("GPU-") and gpu.name for gpu in driver.gpus)
    assert driver.version.split(".")[0].isdecimal()
    calls = ctypes.CDLL(str(fake_library)).fake_cuda_calls
    calls.restype, calls.argtypes = ctypes.c_size_t, [ctypes.c_char_p]
    before = calls(b"cuDevicePrimaryCtxRetain")
    look_at_driver(str(fake_library))
    assert calls(b"cuDevicePrimaryCtxRetain") == before


def test_a_device_without_virtual_memory_management_is_wrong(
    fake_library: Path, monkeypatch: pytest.MonkeyPatch, runtime: Path
) -> None:
    monkeypatch.setenv("FAKE_CUDA_NO_VMM", "1")
    driver = look_at_driver(str(fake_library))
    finding = found(lambda: driver)[f"device {driver.gpus[0].uuid}"]
    assert finding.level == "wrong" and "no virtual memory" in finding.says


def test_a_library_that_is_none_is_a_driver_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(tem.DriverMissing):
        look_at_driver(str(tmp_path / "libcuda.so.1"))


def test_a_driver_that_does_not_start_is_wrong(runtime: Path) -> None:
    def refuses() -> Driver:
        raise tem.DriverError("cuInit failed with 803", 803)

    finding = found(refuses)["driver"]
    assert finding.level == "wrong" and "803" in finding.says


def test_a_machine_without_a_driver_can_do_with_the_host_backend(runtime: Path) -> None:
    if not Path("/dev/nvidiactl").exists() and not Path("/proc/driver/nvidia").exists():
        assert found()["driver"].level == "note"


def test_devices_that_are_hidden_are_noted(runtime: Path) -> None:
    assert "CUDA_VISIBLE_DEVICES" in found(lambda: Driver("13.0", ()))["device"].mend
    assert found(lambda: Driver("13.0", (GPU,)))["device GPU-1"].level == "ok"


def test_a_broker_that_answers_is_well(control: Control) -> None:
    control.broker.now = msgspec.structs.replace(control.broker.now, version=tem.__version__)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as tenants:
        tenants.bind(str(control.path.parent / "tenants.sock"))
        findings = found()
    assert findings["broker"].level == findings["directory"].level == "ok"
    assert "tenants' socket" not in findings


def test_a_broker_of_another_version_is_wrong(control: Control) -> None:
    control.broker.now = msgspec.structs.replace(control.broker.now, version="0.0.9")
    finding = found()["broker"]
    assert finding.level == "wrong" and "0.0.9" in finding.says and "restart" in finding.mend


def test_a_socket_of_tenants_that_was_removed_is_wrong(control: Control) -> None:
    assert found()["tenants' socket"].level == "wrong"


def test_no_broker_is_a_note_and_a_dead_one_s_socket_is_wrong(runtime: Path) -> None:
    assert found()["broker"].level == "note"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(runtime / "control.sock"))
    left.close()
    finding = found()["broker"]
    assert finding.level == "wrong" and "tem serve" in finding.says


def test_a_directory_that_others_may_write_to_is_wrong(runtime: Path) -> None:
    os.chmod(runtime, 0o777)
    finding = found()["directory"]
    assert finding.level == "wrong" and "chmod 0700" in finding.says


def test_a_directory_that_is_too_long_for_a_socket_is_wrong(runtime: Path) -> None:
    assert found(TEM_RUNTIME_DIR=f"/tmp/{'x' * 120}")["directory"].level == "wrong"


def test_the_exit_code_is_1_where_something_is_wrong_and_0_otherwise(runtime: Path) -> None:
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == ("wrong" in {line.split()[0] for line in done.stdout.splitlines()})
    os.chmod(runtime, 0o777)
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 1
    as_json = CliRunner().invoke(main, ["doctor", "--json"])
    assert as_json.exit_code == 1
    assert "wrong" in {finding.level for finding in msgspec.json.decode(as_json.stdout, type=list[Finding])}
