"""What weights may be, and how they lie in memory."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_elastic_mem as tem
from tests.rungs import CudaRung, Rung
from tests.shared.processes import Broker, MiB, until
from tests.shared.samples import sample
from torch_elastic_mem import _C
from torch_elastic_mem.weights import ALIGNMENT, SafetensorsFile, StateDict, size_of


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with tempfile.TemporaryDirectory(prefix="tem") as made:
        Path(made).chmod(0o700)
        running = Broker(Path(made))
        yield running
        running.end()


@pytest.fixture
def arena(rung: Rung, broker: Broker) -> Iterator[tem.Arena]:
    with rung.arena("256MiB", broker=broker.path) as made:
        broker.device = "HOST" if rung.device == "host" else made.uuid
        yield made


def octets(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)


def test_every_tensor_is_as_it_was(arena: tem.Arena) -> None:
    given = sample(5)
    with tem.share(given, "base", arena=arena) as weights:
        for name, tensor in given.items():
            found = weights[name]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.is_contiguous() and found.data_ptr() % ALIGNMENT == 0
            assert torch.equal(octets(found), octets(tensor))
        assert weights["tied"] is weights["large"]
        assert weights["transposed"].data_ptr() != weights["large"].data_ptr()
        assert list(weights) == list(given) and len(weights) == len(given)
        assert "base" in repr(weights) and weights.device == arena.device and weights.nbytes == 6 * MiB
    assert weights.tensors == {}


def test_tied_parameters_of_a_module_stay_tied(rung: Rung, arena: tem.Arena) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(50, 8)
            self.head = torch.nn.Linear(8, 50, bias=False)
            self.head.weight = self.embed.weight

    # The same bits of another device's kernels are nobody's promise.
    device = "cuda" if isinstance(rung, CudaRung) else "cpu"
    model, tokens = Tied().to(device), torch.tensor([3], device=device)
    before = model.head(model.embed(tokens))
    with tem.share(model.state_dict(), "tied", arena=arena) as weights:
        model.load_state_dict(weights.tensors, assign=True)
        assert (
            model.embed.weight.data_ptr() == model.head.weight.data_ptr() == weights["head.weight"].data_ptr()
        )
        assert torch.equal(model.head(model.embed(tokens)), before)
        del model


def test_the_arena_is_left_as_it_was(arena: tem.Arena, broker: Broker) -> None:
    with tem.share({"a": torch.ones(3 * MiB)}, "base", arena=arena):
        shot = arena.snapshot()
        assert (shot.leased, shot.created, shot.spare, shot.accounts) == (0, 0, 0, [])
        assert broker.leased() == 12 * MiB
    until(lambda: broker.leased() == 0)


def test_a_share_that_does_not_fit_leaves_nothing(arena: tem.Arena, broker: Broker) -> None:
    before = broker.descriptors()
    with pytest.raises(tem.OutOfMemory):
        tem.share({"a": torch.ones(1).expand(arena.capacity)}, "base", arena=arena)
    until(lambda: broker.leased() == 0 and broker.descriptors() <= before)
    assert arena.snapshot().accounts == [] and broker.state()["shared"] == []


def test_weights_that_cannot_be_read_leave_nothing(
    arena: tem.Arena, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: object, region: torch.Tensor) -> None:
        raise RuntimeError("no such luck")

    before = broker.descriptors()
    monkeypatch.setattr(StateDict, "fill", fails)
    with pytest.raises(RuntimeError, match="no such luck"):
        tem.share({"a": torch.ones(3)}, "base", arena=arena)
    until(lambda: broker.leased() == 0 and broker.descriptors() <= before)
    assert arena.snapshot().accounts == []


def test_many_extents_cross_in_batches(rung: Rung, arena: tem.Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_elastic_mem.share_link.BATCH", 2)
    given = torch.arange(34 * MiB // 4, dtype=torch.int32)
    with tem.share({"a": given}, "base", arena=arena) as weights:
        assert torch.equal(weights["a"].cpu(), given)
        attached = tem.attach("base", device=rung.device, broker=str(arena.broker))
        assert torch.equal(attached["a"].cpu(), given)


def test_threads_attach_and_close_at_once(rung: Rung, arena: tem.Arena, broker: Broker) -> None:
    given = {"a": torch.arange(1000)}
    wrong: list[object] = []

    def visit() -> None:
        for _ in range(10):
            with tem.attach("base", device=rung.device, broker=broker.path) as weights:
                if not torch.equal(weights["a"].cpu(), given["a"]):
                    wrong.append(weights)

    with tem.share(given, "base", arena=arena):
        threads = [threading.Thread(target=visit) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert not wrong
        until(lambda: len(broker.state()["shared"][0]["members"]) == 1)
    until(lambda: broker.leased() == 0)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({}, "there are no tensors to share"),
        ({"a": 3}, "weights are tensors by name; got 'a': int"),
        ({3: torch.ones(1)}, "weights are tensors by name; got 3: Tensor"),
        (
            {"a": torch.ones(2, 2).to_sparse()},
            "'a' is a Tensor of torch.sparse_coo on cpu; only plain tensors",
        ),
        ({"a": torch.ones(2, device="meta")}, "'a' is a Tensor of torch.strided on meta; only plain tensors"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(arena: tem.Arena, weights: Any, says: str) -> None:
    with pytest.raises(tem.InvalidArgument, match=says):
        tem.share(weights, "base", arena=arena)
    assert arena.snapshot().accounts == []


def test_an_arena_that_stands_alone_cannot_share() -> None:
    with (
        tem.Arena("host", capacity="4MiB", broker=None) as alone,
        pytest.raises(tem.BrokerError, match="stands alone, and memory is shared through a broker"),
    ):
        tem.share({"a": torch.ones(1)}, "base", arena=alone)


def test_where_the_environment_says_no_broker_nobody_attaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEM_BROKER", "0")
    with pytest.raises(tem.BrokerError, match="TEM_BROKER says that there is no broker"):
        tem.attach("base", device="host")


# Files of safetensors.


def save(path: Path, entries: dict[str, Any], data: bytes) -> Path:
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_a_file_of_safetensors_is_read_bit_for_bit(arena: tem.Arena, tmp_path: Path) -> None:
    import safetensors.torch as library

    given = {name: tensor.clone().contiguous() for name, tensor in sample(7).items()}
    library.save_file(given, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with tem.share(tmp_path / "model.safetensors", "base", arena=arena) as weights:
        assert weights.tensors.keys() == given.keys()
        for name, tensor in given.items():
            assert (weights[name].dtype, weights[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(octets(weights[name]), octets(tensor))


def test_a_file_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_elastic_mem.weights._CHUNK", 7)
    data = bytes(range(100))
    entries = {"a": {"dtype": "U8", "shape": [60], "data_offsets": [40, 100]}}
    entries["b"] = {"dtype": "U8", "shape": [40], "data_offsets": [0, 40]}
    source = SafetensorsFile(save(tmp_path / "f", entries, data))
    region = torch.zeros(size_of(source.slots), dtype=torch.uint8)
    source.fill(region)
    slots = source.slots
    assert bytes(region[: slots["a"].nbytes].tolist()) == data[40:]
    assert bytes(region[slots["b"].offset :].tolist()) == data[:40]


@pytest.mark.parametrize(
    ("entries", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"12345678"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b"1234"),
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}, b"1234"),
        ({"a": 3}, b""),
        ([], b""),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, entries: Any, data: bytes) -> None:
    with pytest.raises(tem.InvalidArgument):
        SafetensorsFile(save(tmp_path / "f", entries, data))


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 20, struct.pack("<Q", 5) + b"{{{{{"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(tem.InvalidArgument, match="is no file of safetensors"):
        SafetensorsFile(tmp_path / "f")


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(tmp_path / "f")


def test_a_child_of_fork_leaves_nothing_of_its_parents(arena: tem.Arena, broker: Broker) -> None:
    with tem.share({"a": torch.arange(5)}, "base", arena=arena) as weights:
        child = os.fork()
        if child == 0:
            weights.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(broker.state()["shared"][0]["members"]) == 1
        assert weights["a"].tolist() == [0, 1, 2, 3, 4]
    until(lambda: broker.leased() == 0)


@pytest.mark.parametrize("name", ["", "x" * 49, "x" * 500])
def test_a_name_that_cannot_be_is_refused(rung: Rung, arena: tem.Arena, broker: Broker, name: str) -> None:
    with pytest.raises(tem.InvalidArgument):
        tem.share({"a": torch.ones(3)}, name, arena=arena)
    assert arena.snapshot().accounts == [] and broker.leased() == 0
    with pytest.raises(tem.InvalidArgument, match="nobody shares"):
        tem.attach(name, device=rung.device, broker=broker.path)


# What went out.


def test_an_extent_that_went_out_is_never_used_again() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far, tem.Arena("host", capacity="8MiB", broker=None) as arena, arena.account("a") as account:
        with pytest.raises(tem.InvalidArgument, match="not all of it is held"):
            account.range("4MiB")._core.extents()
        out = account.range("4MiB")
        out.grow("4MiB")
        ctypes.memset(out.address, 7, 4 * MiB)
        sizes = out._core.extents()
        assert sum(sizes) == 4 * MiB
        assert out._core.send_extents(near.fileno(), b"all", 0, len(sizes)) == 0
        seen = _C.Attached(_C.host_backend(2 * MiB), sizes)
        assert seen.receive(far.fileno(), 5.0) == b"all"
        seen.open()
        assert seen.read_only
        out.close()
        assert arena.snapshot().spare == 0
        again = account.range("8MiB")
        again.grow("8MiB")
        ctypes.memset(again.address, 1, 8 * MiB)
        assert ctypes.string_at(seen.address, 4 * MiB) == b"\7" * (4 * MiB)
        again.close()


@pytest.mark.parametrize("sizes", [[], [3 * MiB], [2 * MiB, 4 * MiB], [1 * MiB], [128 * MiB]])
def test_extents_that_no_range_has_are_refused(sizes: list[int]) -> None:
    with pytest.raises(tem.InvalidArgument):
        _C.Attached(_C.host_backend(2 * MiB), sizes)


def test_memory_is_opened_and_looked_at_whole() -> None:
    memory = _C.Attached(_C.host_backend(2 * MiB), [2 * MiB])
    with pytest.raises(tem.DriverError, match="0 extents of 1 have come"):
        memory.open()
    for offset, count in ((1, 2 * MiB), (2 * MiB + 1, 0)):
        with pytest.raises(tem.InvalidArgument, match="are not within"):
            memory.export(offset, count)
