"""`torch_allocator`: refusals, and accounts that open when CUDA does. Torch's CUDA side is played here."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import torch_elastic_mem as tem
from tests.rungs import FakeRung, MiB
from torch_elastic_mem import _C, defaults, torch_cuda

pytestmark = pytest.mark.rungs("fake")

hooks = ctypes.CDLL(_C.__file__)
hooks.tem_cuda_alloc.restype = ctypes.c_void_p
hooks.tem_cuda_alloc.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
hooks.tem_cuda_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


class PlayedTorch:
    """What torch's CUDA side answers, and what it was told."""

    def __init__(self) -> None:
        self.backend = "native"
        self.devices = 2
        self.initialised = False
        self.queue: list[Callable[[], object]] = []

    def init(self) -> None:
        for call in self.queue:
            call()
        self.initialised = True

    def lazy_call(self, call: Callable[[], object]) -> None:
        if self.initialised:
            call()
        else:
            self.queue.append(call)


@pytest.fixture
def played(rung: FakeRung, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedTorch]:
    made = PlayedTorch()
    extension = ModuleType("_torch_cuda")
    extension.TORCH_VERSION = ".".join(torch.__version__.split(".")[:2])  # type: ignore[attr-defined]
    extension.make_allocator = lambda directory: ("made over", directory)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_elastic_mem._torch_cuda", extension)
    monkeypatch.setattr(_C, "malloc_directory", lambda: "accounts", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: made.initialised)
    monkeypatch.setattr(torch.cuda, "_lazy_call", made.lazy_call)
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: made.devices)
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: made.backend)
    monkeypatch.setattr(torch_cuda, "_process_allocator", None)
    monkeypatch.setattr(defaults, "_arenas", {})
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    yield made
    for index, account in torch_cuda._process_allocator._accounts.items() if _made() else ():
        _C.set_device_default(index, None)
        account.close()
    for arena in defaults._arenas.values():
        arena.close()


def _made() -> bool:
    return torch_cuda._process_allocator is not None


def charged(account: tem.Account, device: int = 0) -> bool:
    """Whether torch's allocations on a device are charged to the account."""
    before = account.allocator().live_bytes
    block = hooks.tem_cuda_alloc(MiB, device, None)
    grown = account.allocator().live_bytes - before
    hooks.tem_cuda_free(block, MiB, device, None)
    return grown == MiB


def test_the_account_of_a_priority_opens_when_cuda_does(played: PlayedTorch, rung: FakeRung) -> None:
    calls = rung.driver.fake_cuda_calls()
    allocator = tem.torch_allocator("cuda", priority="training")
    assert allocator.allocator() == ("made over", "accounts")
    assert isinstance(allocator, torch.cuda.memory._CUDAAllocator)
    assert rung.driver.fake_cuda_calls() == calls, "the driver was touched"
    played.init()
    account = allocator.account()
    assert (account.name, account.priority, account.device.name) == ("training", "training", "cuda:0")
    assert charged(account)
    assert [one.name for one in tem.default_arena("cuda:0").snapshot().accounts] == ["training"]


def test_an_account_can_be_asked_for_before(played: PlayedTorch) -> None:
    account = tem.torch_allocator(priority=tem.priority("idle"), name="night").account("cuda:0")
    played.init()
    assert (account.name, account.priority) == ("night", "idle")
    assert tem.torch_allocator(priority="idle", name="night").account() is account


def test_a_second_device_is_added_to_the_one_allocator(played: PlayedTorch) -> None:
    allocator = tem.torch_allocator("cuda:0", priority="training")
    played.init()
    assert tem.torch_allocator("cuda:1", priority="training") is allocator
    assert charged(allocator.account("cuda:1"), device=1)
    assert not charged(allocator.account("cuda:0"), device=1)


def test_an_account_takes_the_place_of_one_that_waits(played: PlayedTorch, rung: FakeRung) -> None:
    allocator = tem.torch_allocator(priority="training")
    with rung.arena() as arena, arena.account("mine") as mine:
        assert tem.torch_allocator("cuda", mine) is allocator
        played.init()
        assert allocator.account() is mine and charged(mine)
        with pytest.raises(tem.InUseError, match="charged to 'mine' already, and 'training' was asked"):
            tem.torch_allocator(priority="training")
        allocator._accounts.clear()
        _C.set_device_default(0, None)


@pytest.mark.parametrize("other", [{"priority": "idle"}, {"priority": "training", "name": "other"}])
def test_a_second_account_of_a_device_is_refused(played: PlayedTorch, other: dict[str, str]) -> None:
    for initialise in (lambda: None, played.init):
        initialise()
        allocator = tem.torch_allocator(priority="training")
        with pytest.raises(tem.InUseError, match="charged to 'training' already"):
            tem.torch_allocator(**other)  # type: ignore[arg-type]
        assert allocator.serves(0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "takes an account, or priority='training'"),
        ({"account": "training"}, "takes an account, or priority='training'; got account='training'"),
        ({"priority": "urgent"}, "no priority class 'urgent'"),
        ({"priority": "idle", "device": "cpu"}, "'cpu' is no CUDA device"),
        ({"priority": "idle", "device": "cuda:x"}, "unknown device 'cuda:x'"),
        ({"priority": "idle", "device": "cuda:2"}, "no cuda:2: 2 CUDA devices are visible"),
    ],
)
def test_bad_input_is_refused(played: PlayedTorch, arguments: Any, said: str) -> None:
    with pytest.raises(tem.InvalidArgument, match=said):
        tem.torch_allocator(**arguments)
    assert played.queue == []


def test_an_account_has_its_own_priority_and_device(played: PlayedTorch, rung: FakeRung) -> None:
    with rung.arena() as arena, arena.account("mine") as mine:
        with pytest.raises(tem.InvalidArgument, match="has a priority and a name"):
            tem.torch_allocator("cuda", mine, priority="idle")
        with pytest.raises(tem.InvalidArgument, match="'mine' is on cuda:0, not on 'cuda:1'"):
            tem.torch_allocator("cuda:1", mine)
    with (
        tem.Arena("host", capacity=4 * MiB) as arena,
        arena.account("mine") as mine,
        pytest.raises(tem.InvalidArgument, match="'mine' is on cpu; torch's CUDA memory cannot be"),
    ):
        tem.torch_allocator("cpu", mine)


def test_what_torch_has_done_already_is_told(played: PlayedTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: type[tem.TemError], said: str) -> None:
        with pytest.raises(kind, match=said):
            tem.torch_allocator(priority="training")
        assert not _made()

    monkeypatch.setattr(torch.version, "cuda", None)
    refused(tem.DriverMissing, "built without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    played.initialised = True
    refused(tem.InUseError, "has initialised CUDA already")
    played.initialised = False
    played.backend = "pluggable"
    refused(tem.InUseError, "torch has the allocator 'pluggable' already")
    played.backend = "cudaMallocAsync"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    refused(tem.InvalidArgument, "PYTORCH_ALLOC_CONF gives torch's memory to the driver")
    played.backend = "native"
    tem.torch_allocator(priority="training")


def test_expandable_segments_are_told_to_have_no_effect(
    played: PlayedTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments: True")
    with pytest.warns(UserWarning, match="expandable_segments in PYTORCH_CUDA_ALLOC_CONF has no") as seen:
        tem.torch_allocator(priority="training")
    assert seen[0].filename == __file__


def test_a_device_that_the_driver_has_not_is_an_error_when_cuda_starts_and_again(played: PlayedTorch) -> None:
    played.devices = -1  # NVML cannot say
    allocator = tem.torch_allocator("cuda:9", priority="training")
    for _ in range(2):
        with pytest.raises(tem.TemError):
            played.init()
    with pytest.raises(tem.InvalidArgument, match="no account serves torch on cuda:1"):
        allocator.account("cuda:1")


class PlayedHooks:
    """torch.cuda.memory.CUDAPluggableAllocator."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments

    def allocator(self) -> PlayedHooks:
        return self

    def set_record_stream_fn(self, address: int) -> None:
        self.record_stream = address


@pytest.mark.parametrize(
    ("built", "why"), [("1.0", r"was built for torch 1\.0, and this is"), (None, "cannot be loaded")]
)
def test_without_the_extension_plain_hooks_and_a_warning_serve(
    played: PlayedTorch, monkeypatch: pytest.MonkeyPatch, built: str | None, why: str
) -> None:
    if built is None:
        monkeypatch.setitem(sys.modules, "torch_elastic_mem._torch_cuda", None)
    else:
        sys.modules["torch_elastic_mem._torch_cuda"].TORCH_VERSION = built  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda.memory, "CUDAPluggableAllocator", PlayedHooks)
    with pytest.warns(UserWarning, match=rf"snapshots.*MemPool and CUDA IPC.*{why}.*pip install") as seen:
        allocator = tem.torch_allocator(priority="training")
    assert seen[0].filename == __file__
    plug = allocator.allocator()
    assert plug.arguments == (_C.__file__, "tem_cuda_alloc", "tem_cuda_free") and plug.record_stream
    played.init()
    assert charged(allocator.account())
