"""torch.compile, and the graph trees under it."""

from __future__ import annotations

import gc

import torch

from .harness import check, clean, pools, private, raises, recording


@check
def graph_trees_train_and_infer() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).cuda()
    compiled = torch.compile(model, mode="reduce-overhead")
    for turn in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        batch = torch.randn(32, 64, device="cuda")
        loss = compiled(batch).square().mean()
        loss.backward()
        torch.testing.assert_close(loss, model(batch).square().mean(), msg=f"turn {turn}")
        model.zero_grad()


@check
def graph_trees_branch_and_go_back_to_a_checkpoint() -> None:
    @torch.compile(mode="reduce-overhead")
    def first(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).relu()

    @torch.compile(mode="reduce-overhead")
    def left(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @torch.compile(mode="reduce-overhead")
    def right(x: torch.Tensor) -> torch.Tensor:
        return x.sum(0) * 3

    x = torch.ones(256, 256, device="cuda")
    with torch.no_grad():
        for turn in range(12):
            torch.compiler.cudagraph_mark_step_begin()
            middle = first(x)
            # The branch that comes late is recorded after the other was replayed.
            end = right(middle) if turn % 3 == 2 and turn > 4 else left(middle)
            expected = 2.0 * 256 * 3 if turn % 3 == 2 and turn > 4 else 3.0
            assert bool((end == expected).all()), turn
            del middle, end


@check
def graph_trees_find_their_memory_as_they_left_it() -> None:
    import torch._inductor.config as config

    @torch.compile(mode="reduce-overhead")
    def first(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, (x + 1).relu()

    @torch.compile(mode="reduce-overhead")
    def second(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(0)

    x = torch.ones(300, 300, device="cuda")
    with (
        torch.no_grad(),
        config.patch(
            {"triton.slow_path_cudagraph_asserts": True, "triton.fast_path_cudagraph_asserts": True}
        ),
    ):
        for turn in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            one, two = first(x)
            end = second(one if turn % 2 else two)
            assert bool((end == 1200.0).all()), turn
            del one, two, end


@check
def an_output_that_was_overwritten_says_so() -> None:
    @torch.compile(mode="reduce-overhead")
    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    x = torch.ones(100, device="cuda")
    with torch.no_grad():
        outputs = []
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            outputs.append(triple(x))
        # torch marks what a warm-up or a recording gave; what a replay gave is overwritten in silence.
        warmed_up, recorded, replayed = outputs
        for overwritten in (warmed_up, recorded):
            with raises(RuntimeError, "overwritten"):
                overwritten + 1
        assert bool((replayed == 3).all())


@check
def entries_of_the_history_name_the_compiled_region() -> None:
    @torch.compile
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    x = torch.ones(1000, device="cuda")
    double(x)
    with recording(stacks="python", compile_context=True):
        double(x)
        torch.ones(1000, device="cuda")
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
    named = [each["compile_context"] for each in trace if each["action"] == "alloc"]
    assert any(each.startswith("Torch-Compiled Region") for each in named), named
    assert named[-1] == "N/A", named


@check
def the_memory_of_graph_trees_goes_when_they_are_reset() -> None:
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    torch._dynamo.reset()
    reset_cudagraph_trees()
    private._cuda_clearCublasWorkspaces()
    gc.collect()
    clean()
    assert pools() <= {(0, 0)}, pools()
