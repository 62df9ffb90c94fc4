"""Facts of the machine a benchmark ran on: enough to read its figures by, nothing that names the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path


def facts(*, gpu_uuid: str | None = None) -> dict[str, str]:
    """Device, driver, CPU and versions, as text for people.

    Args:
        gpu_uuid: the CUDA device in use ("GPU-..."), or None when none is.
    """
    found: dict[str, str] = {}
    if gpu_uuid is not None:
        found |= _gpu(gpu_uuid)
    found["cpu"] = f"{len(os.sched_getaffinity(0))} x {_cpu_name()}"
    found["kernel"] = platform.release().partition("-")[0]
    found["python"] = platform.python_version()
    found["torch"] = _version("torch")
    found["torch_elastic_mem"] = _version("torch_elastic_mem")
    return found


def _gpu(uuid: str) -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"gpu": "unknown (no nvidia-smi)"}
    query = [tool, "--id=" + uuid, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    fields = [field.strip() for field in answer.stdout.strip().split(",")]
    if answer.returncode != 0 or len(fields) != 3:
        return {"gpu": "unknown (nvidia-smi does not know the device)"}
    return {"gpu": f"{fields[0]} {fields[2]}", "driver": fields[1]}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
