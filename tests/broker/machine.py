"""A machine to look at: states and events as a broker would tell them."""

from __future__ import annotations

from typing import Any

from torch_elastic_mem.broker.state import AccountState, BlocksState, DeviceState, Event, MachineState

GiB = 1 << 30
GPU = "GPU-6e1b3a0c-0000-4000-8000-0123456789ab"


def account(name: str = "fine-tune", **changes: Any) -> AccountState:
    fields: dict[str, Any] = {
        "pid": 4711,
        "uid": 1000,
        "process": "train.py",
        "name": name,
        "priority": "training",
        "value": 100,
        "lease": 40 * GiB,
        "held": 38 * GiB,
        "idle": 2 * GiB,
        "min": 4 * GiB,
        "low": 0,
        "high": None,
        "max": None,
        "weight": 1.0,
        "state": "ok",
        "owed": 0,
        "waiting": 0,
        "given": 12 * GiB,
        "taken": 52 * GiB,
        "denied": 1,
        "recent_yields": 3,
        "slowest_yield": 0.0123,
    }
    return AccountState(**fields | changes)


def serving(**changes: Any) -> AccountState:
    fields: dict[str, Any] = {
        "pid": 4712,
        "process": "serve.py",
        "priority": "serving",
        "value": 1000,
        "lease": 20 * GiB,
        "held": 20 * GiB,
        "idle": 0,
        "max": 60 * GiB,
        "recent_yields": 0,
        "slowest_yield": 0.0,
        "blocks": BlocksState(in_use=500, cached=1500, free=48, parked=8191),
    }
    return account("chat", **fields | changes)


def device(*accounts: AccountState, **changes: Any) -> DeviceState:
    leased = sum(each.lease for each in accounts)
    fields: dict[str, Any] = {
        "uuid": GPU,
        "label": "NVIDIA H100 80GB HBM3",
        "backend": "cuda",
        "total": 80 * GiB,
        "capacity": 78 * GiB,
        "outside": 1 * GiB,
        "reserve_low": 1 * GiB,
        "reserve_high": 2 * GiB,
        "leased": leased,
        "free": 77 * GiB - leased,
        "queued": 0,
        "pressure": {"serving": 0.25, "training": 0.0},
        "accounts": list(accounts),
    }
    return DeviceState(**fields | changes)


def machine(*devices: DeviceState, **changes: Any) -> MachineState:
    fields: dict[str, Any] = {
        "version": "0.1.0",
        "pid": 99,
        "epoch": 12345,
        "uptime": 3671.0,
        "clients": 2,
        "grants": 17,
        "denials": 1,
        "asks": 4,
        "devices": list(devices) or [device(serving(), account())],
    }
    return MachineState(**fields | changes)


def yielded(seq: int = 1, **changes: Any) -> Event:
    fields: dict[str, Any] = {
        "seq": seq,
        "start_ns": 1_000_000_000 + seq * 1_000_000,
        "duration_ns": 5_000_000,
        "kind": "yield",
        "device": GPU,
        "pid": 4711,
        "account": "fine-tune",
        "bytes": 2 * GiB,
        "asked": 3 * GiB,
        "rung": "trim",
        "demander": "chat/4712",
    }
    return Event(**fields | changes)


def granted(seq: int = 2, **changes: Any) -> Event:
    fields: dict[str, Any] = {
        "seq": seq,
        "start_ns": 1_000_000_000 + seq * 1_000_000,
        "duration_ns": 6_000_000,
        "kind": "grant",
        "device": GPU,
        "pid": 4712,
        "account": "chat",
        "bytes": 3 * GiB,
    }
    return Event(**fields | changes)
