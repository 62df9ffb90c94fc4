"""Blocks that other processes map: two real processes, on every rung that needs no GPU."""

from __future__ import annotations

import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

import torch_elastic_mem as tem
from tests.alloc.sharing import ROOT, Home, Peer
from tests.arena.watch import comes_true
from tests.rungs import MiB, Rung
from torch_elastic_mem import _C

pytestmark = [pytest.mark.rungs("host"), pytest.mark.rungs("fake")]
G = 2 * MiB


@pytest.fixture
def home(rung: Rung) -> Iterator[Home]:
    made = Home(rung)
    yield made
    gc.collect()
    made.heap.close()
    made.arena.collect()
    made.account.close()
    made.arena.close()


@pytest.fixture
def peer(rung: Rung) -> Iterator[Peer]:
    made = Peer(rung)
    yield made
    made.end()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_another_process_reads_and_writes_the_block_itself(home: Home, peer: Peer, rung: Rung) -> None:
    # An extent of 2 MiB and one of 4: the run is not aligned to its own size.
    address = home.heap.allocate(3 * G, 0)
    rung.write(address, b"ours")
    rung.write(address + 3 * G - 4, b"last")
    handle, offset = home.heap.share(address)
    before = peer.ask("held")
    there = peer.ask("open", handle.hex()) + offset
    assert bytes.fromhex(peer.ask("read", there, 4)) == b"ours"
    assert bytes.fromhex(peer.ask("read", there + 3 * G - 4, 4)) == b"last"
    peer.ask("write", there + G, b"theirs".hex())
    assert rung.read(address + G, 6) == b"theirs"
    assert peer.ask("held") == before == 0, "who shared it pays"
    peer.ask("close", 0)
    home.heap.free(address)


def test_blocks_of_one_run_of_extents_have_one_handle_and_are_mapped_once(
    home: Home, peer: Peer, rung: Rung
) -> None:
    small = [home.heap.allocate(1000, 0) for _ in range(5)]
    for number, address in enumerate(small):
        rung.write(address, bytes([number]) * 1000)
    shared = [home.heap.share(address) for address in small]
    assert len({handle for handle, _ in shared}) == 1
    bases = {peer.ask("open", handle.hex()) for handle, _ in shared}
    assert len(bases) == 1
    (base,) = bases
    for number, (_, offset) in enumerate(shared):
        assert bytes.fromhex(peer.ask("read", base + offset, 1000)) == bytes([number]) * 1000
    for address in small:
        home.heap.free(address)


def test_only_the_extents_under_a_block_are_shared(home: Home, peer: Peer) -> None:
    blocks = [home.heap.allocate(G, 0) for _ in range(4)]
    handles = [home.heap.share(address) for address in blocks]
    assert len({handle for handle, _ in handles}) == 4
    assert {offset for _, offset in handles} == {0}
    for address in blocks:
        home.heap.free(address)


def test_what_is_shared_stays_until_the_block_is_freed_and_goes_then(home: Home, peer: Peer) -> None:
    address, other = home.heap.allocate(G, 0), home.heap.allocate(G, 0)
    handle, _ = home.heap.share(address)
    there = peer.ask("open", handle.hex())
    home.heap.free(other)
    home.heap.empty_cache()
    home.account.trim()
    assert home.account.held == G
    peer.ask("write", there, b"kept".hex())
    assert home.heap.share(address)[0] == handle, "the same block, the same handle"
    home.heap.free(address)
    assert home.account.trim() == G
    assert bytes.fromhex(peer.ask("read", there, 4)) == b"kept", "whoever still maps it keeps its memory"
    peer.ask("close", 0)


def test_a_freed_blocks_handle_is_refused_even_when_its_address_lives_again(home: Home, peer: Peer) -> None:
    address = home.heap.allocate(G, 0)
    handle, _ = home.heap.share(address)
    home.heap.free(address)
    assert home.heap.allocate(G, 0) == address
    with pytest.raises(tem.ClosedError, match=f"process {os.getpid()} .*has been freed by the process"):
        peer.ask("open", handle.hex())
    again, _ = home.heap.share(address)
    assert again != handle
    peer.ask("open", again.hex())
    home.heap.free(address)


def test_the_last_owner_unmaps_and_a_later_open_maps_anew(home: Home, peer: Peer, rung: Rung) -> None:
    address = home.heap.allocate(3 * G, 0)
    handle, _ = home.heap.share(address)
    if rung.name == "fake":
        before = peer.ask("live")
    peer.ask("open", handle.hex())
    peer.ask("open", handle.hex())
    peer.ask("close", 0)
    peer.ask("close", 1)
    if rung.name == "fake":
        assert peer.ask("live") == before
    rung.write(address, b"anew")
    there = peer.ask("open", handle.hex())
    assert bytes.fromhex(peer.ask("read", there, 4)) == b"anew"
    home.heap.free(address)


def test_an_exporter_may_die_after_the_import_and_not_before(home: Home, rung: Rung) -> None:
    exporter = Peer(rung)
    handle, offset, _ = exporter.ask("share", b"legacy".hex())
    late = exporter.ask("share", b"late".hex())[0]
    memory = home.heap.open_shared(bytes.fromhex(handle))
    exporter.end()
    assert rung.read(memory.address + offset, 6) == b"legacy"
    rung.write(memory.address + offset, b"still ours")
    with pytest.raises(tem.ClosedError, match=f"process {exporter.process.pid} shared .*it has ended"):
        home.heap.open_shared(bytes.fromhex(late))
    assert home.heap.open_shared(bytes.fromhex(handle)).address == memory.address
    memory.close()


def test_an_importer_that_is_killed_harms_nobody(home: Home, rung: Rung) -> None:
    address = home.heap.allocate(G, 0)
    handle, _ = home.heap.share(address)
    victim = Peer(rung)
    victim.ask("open", handle.hex())
    victim.end()
    survivor = Peer(rung)
    survivor.ask("write", survivor.ask("open", handle.hex()), b"alive".hex())
    assert rung.read(address, 5) == b"alive"
    survivor.end()
    home.heap.free(address)


@pytest.mark.slow  # waits as long as an importer does
def test_a_stopped_exporter_is_given_up_on(home: Home, rung: Rung) -> None:
    exporter = Peer(rung)
    handle = exporter.ask("share", b"x".hex())[0]
    exporter.process.send_signal(signal.SIGSTOP)
    os.waitpid(exporter.process.pid, os.WUNTRACED)
    with pytest.raises(tem.DriverError, match="has not answered for 10 seconds; is it stopped"):
        home.heap.open_shared(bytes.fromhex(handle))
    exporter.end()


def test_a_block_of_more_extents_than_one_message_carries(rung: Rung, peer: Peer) -> None:
    arena = rung.arena(600 * MiB)
    account = arena.account("training")
    heap = _C.Allocator(account._core, "training")
    # Every second extent of 2 MiB is given back and mapped anew, so that the run is of small extents.
    blocks = [heap.allocate(G, 0) for _ in range(280)]
    for address in blocks:
        heap.free(address)
    whole = heap.allocate(280 * G, 0)
    assert whole == blocks[0]
    rung.write(whole + 279 * G, b"far")
    before = descriptors()
    handle, offset = heap.share(whole)
    there = peer.ask("open", handle.hex()) + offset
    assert bytes.fromhex(peer.ask("read", there + 279 * G, 3)) == b"far"
    # What was sent is closed after the other end has it.
    said = "a listening socket, a connection, and nothing else"
    assert comes_true(lambda: descriptors() <= before + 2), said
    heap.free(whole)
    heap.close()
    account.close()


def test_bytes_that_are_no_handle_are_refused(home: Home) -> None:
    address = home.heap.allocate(G, 0)
    handle, _ = home.heap.share(address)
    for wrong in (b"", b"\x02c" + bytes(64), handle[:-1], handle + b"\0", handle[:40], b"\x7fTEM"):
        with pytest.raises(tem.InvalidArgument, match="no handle of memory that torch_elastic_mem shared"):
            home.heap.open_shared(wrong)
    with pytest.raises(tem.InvalidArgument, match="of version 9, and this is version 1"):
        home.heap.open_shared(handle[:4] + b"\x09" + handle[5:])
    # Any byte changed is an error, or is the number of the process, which is for messages alone.
    for at in range(len(handle)):
        changed = handle[:at] + bytes([handle[at] ^ 0x41]) + handle[at + 1 :]
        if 5 <= at < 9:
            continue
        with pytest.raises(tem.TemError):
            home.heap.open_shared(changed)
    home.heap.free(address)


def test_what_is_no_live_block_is_not_shared(home: Home) -> None:
    address = home.heap.allocate(4096, 0)
    for wrong in (0, address + 512, address + 64 * MiB):
        with pytest.raises(tem.InvalidArgument, match=f"sharing of {wrong or '.nil.'}|sharing of {wrong:#x}"):
            home.heap.share(wrong)
    home.heap.free(address)
    with pytest.raises(tem.InvalidArgument):
        home.heap.share(address)


def test_a_process_may_open_what_it_shared_itself(home: Home, rung: Rung) -> None:
    address = home.heap.allocate(G, 0)
    handle, _ = home.heap.share(address)
    memory = home.heap.open_shared(handle)
    assert memory.address != address
    rung.write(memory.address, b"mirror")
    assert rung.read(address, 6) == b"mirror"
    memory.close()
    home.heap.free(address)


def test_an_import_goes_behind_the_work_that_may_touch_it(home: Home, rung: Rung) -> None:
    address = home.heap.allocate(G, 0)
    handle, _ = home.heap.share(address)
    busy = rung.stream()
    memory = home.heap.open_shared(handle)
    there = memory.address
    busy.submit()
    closing = threading.Thread(target=memory.close)
    closing.start()
    time.sleep(0.2)
    assert closing.is_alive()
    rung.write(there, b"in flight")
    busy.complete()
    closing.join(5)
    assert not closing.is_alive()
    home.heap.free(address)


def test_the_thread_starts_with_the_first_share_takes_no_signal_and_strangers_are_let_go(rung: Rung) -> None:
    program = f"""
import os, sys, threading, torch_elastic_mem as tem, torch_elastic_mem.arena
from torch_elastic_mem import _C
torch_elastic_mem.arena.LIBCUDA = {str(sys.modules["torch_elastic_mem.arena"].LIBCUDA)!r}
arena = tem.Arena({rung.device!r}, capacity=1 << 24, reserve=(0, 0))
account = arena.account("a")
heap = _C.Allocator(account._core, "a")
block = heap.allocate(1 << 21, 0)
before = set(os.listdir("/proc/self/task"))
handle, _ = heap.share(block)
(thread,) = set(os.listdir("/proc/self/task")) - before
status = open(f"/proc/self/task/{{thread}}/status").read()
blocked = status.split("SigBlk:")[1].split()
print(handle.hex(), blocked[0], flush=True)
if os.fork() == 0:
    try:
        heap.share(block)
    except tem.ForkedError:
        print("forked", flush=True)
    input()
    os._exit(0)
os.wait()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdin and process.stdout
    text, blocked = process.stdout.readline().split()
    assert int(blocked, 16) & ((1 << 15) - 1 - (1 << 8)) == (1 << 15) - 1 - (1 << 8)
    assert process.stdout.readline() == "forked\n"
    name = b"\0torch_elastic_mem-" + text[18:50].encode()
    for message in (b"", b"hello", struct.pack("<4sIQ16sQ", b"\x7fTEM", 1, 1, bytes(16), 0)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(5)
            stranger.connect(name)
            if message:
                stranger.send(message)
                answer, ancillary, *_ = stranger.recvmsg(4096, 4096)
                assert not ancillary
                assert answer == b"" or answer[4] == 1, "no such run"
    process.kill()
    process.wait()
    # The forked child lives, and holds no copy of the socket.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late, pytest.raises(ConnectionRefusedError):
        late.connect(name)
    process.stdin.close()
    process.stdout.close()
