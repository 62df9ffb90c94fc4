"""Blocks and the streams that use them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .harness import LONG, MiB, check, clean, stat, tensor

SIZE = 32 * MiB


def freed_while_a_stream_uses_it(
    used: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[int, torch.cuda.Stream]:
    """The address of a block that was freed, and a stream whose kernels still write it."""
    side = torch.cuda.Stream()
    # A kernel's first launch may wait for all that runs.
    torch.cuda._sleep(1)
    held = tensor(SIZE).fill_(0)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        held.fill_(1)
    used(held).record_stream(side)
    return held.data_ptr(), side


def taken_back_only_when_the_stream_has_done(address: int, side: torch.cuda.Stream) -> None:
    assert not side.query(), "the machine is too slow for this check"
    others = [tensor(SIZE) for _ in range(3)]
    assert address not in [each.data_ptr() for each in others]
    assert stat("active_bytes.all.current") >= stat("allocated_bytes.all.current") + SIZE
    side.synchronize()
    others += [tensor(SIZE) for _ in range(3)]
    assert address in [each.data_ptr() for each in others]
    assert stat("active_bytes.all.current") == stat("allocated_bytes.all.current")


@check
def a_stream_recorded_on_a_view_holds_the_whole_block() -> None:
    taken_back_only_when_the_stream_has_done(*freed_while_a_stream_uses_it(lambda held: held[SIZE // 2 :]))


@check
def a_stream_recorded_on_a_view_of_another_type_holds_the_whole_block() -> None:
    taken_back_only_when_the_stream_has_done(
        *freed_while_a_stream_uses_it(lambda held: held.view(torch.float32).view(-1, 64).t()[3])
    )


@check
def a_block_that_waits_for_a_stream_shows_so_in_the_snapshot() -> None:
    address, side = freed_while_a_stream_uses_it(lambda held: held)

    def states() -> list[str]:
        blocks = [block for each in torch.cuda.memory_snapshot() for block in each["blocks"]]
        return [block["state"] for block in blocks if block["address"] == address]

    assert states() == ["active_pending_free"]
    side.synchronize()
    tensor(1)
    assert states() != ["active_pending_free"]


@check
def small_blocks_wait_for_their_streams_too() -> None:
    side = torch.cuda.Stream()
    clean()
    held = [torch.zeros(100, device="cuda") for _ in range(200)]
    torch.cuda.synchronize()
    taken = {each.data_ptr() for each in held}
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        for each in held:
            each.record_stream(side)
    held.clear()
    assert not side.query(), "the machine is too slow for this check"
    held = [torch.zeros(100, device="cuda") for _ in range(200)]
    assert not taken & {each.data_ptr() for each in held}
    side.synchronize()
    held = [torch.zeros(100, device="cuda") for _ in range(200)]
    assert taken & {each.data_ptr() for each in held}


@check
def the_own_stream_of_a_block_need_not_be_waited_for() -> None:
    held = tensor(SIZE)
    address = held.data_ptr()
    torch.cuda._sleep(LONG)
    held.record_stream(torch.cuda.current_stream())
    del held
    assert tensor(SIZE).data_ptr() == address


@check
def a_block_freed_on_one_stream_does_not_serve_another() -> None:
    side = torch.cuda.Stream()
    held = tensor(SIZE)
    address = held.data_ptr()
    del held
    other = tensor(SIZE, side)
    assert other.data_ptr() != address
    del other
    assert tensor(SIZE).data_ptr() == address


@check
def a_stream_of_somebody_else_has_blocks_of_its_own() -> None:
    side = torch.cuda.Stream()
    external = torch.cuda.ExternalStream(side.cuda_stream)
    held = tensor(SIZE, external)
    address = held.data_ptr()
    del held
    assert tensor(SIZE, side).data_ptr() == address


@check
def empty_tensors_are_recorded_as_well() -> None:
    tensor(0).record_stream(torch.cuda.Stream())


@check
def gradients_are_right_where_the_forward_pass_used_two_streams() -> None:
    side = torch.cuda.Stream()
    main = torch.cuda.current_stream()
    for turn in range(20):
        x = torch.linspace(0, 1 + turn, 1 << 18, device="cuda", requires_grad=True)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            y = (x * 2).sin()
            x.record_stream(side)
        z = (x * 3).cos()
        main.wait_stream(side)
        y.record_stream(main)
        (y * z).sum().backward()
        inside = x.detach()
        expected = 2 * (2 * inside).cos() * (3 * inside).cos() - 3 * (2 * inside).sin() * (3 * inside).sin()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-4)


@check
def batches_that_are_copied_ahead_arrive_whole() -> None:
    ahead = torch.cuda.Stream()
    main = torch.cuda.current_stream()
    pinned = [torch.full((1 << 20,), float(turn), pin_memory=True) for turn in range(30)]
    sums = []
    for batch in pinned:
        with torch.cuda.stream(ahead):
            copied = batch.to("cuda", non_blocking=True)
        main.wait_stream(ahead)
        copied.record_stream(main)
        sums.append((copied * 2).sum())
        del copied
    assert [each.item() for each in sums] == [2.0 * turn * (1 << 20) for turn in range(30)]
