"""What moving a block touches in each kind of release: vLLM's pool, its managers, and the runners' tables."""

from __future__ import annotations

import inspect
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from tests.vllm.pools import cached, fill, find, free_ids, hash_of, pool_of, take
from torch_elastic_mem.integrations.vllm import compat


def test_who_holds_a_block_holds_it_under_its_new_number() -> None:
    pool = pool_of(10)
    first, second = take(pool, [3, 4])
    pool.touch([first])
    order = [block for block in free_ids(pool) if block != 7]
    compat.exchange(pool, 3, 7)
    assert (first.block_id, first.ref_cnt, second.block_id) == (7, 2, 4)
    assert [block.block_id for block in pool.blocks] == list(range(10))
    assert pool.blocks[7] is first
    assert [block for block in free_ids(pool) if block != 3] == order
    pool.free_blocks([first, second])
    pool.free_blocks([first])
    assert sorted(free_ids(pool)) == list(range(1, 10))


def test_what_is_cached_in_a_block_is_found_under_its_new_number() -> None:
    pool = pool_of(10)
    (block,) = take(pool, [3])
    fill(pool, block, 5)
    compat.exchange(pool, 3, 7)
    assert find(pool, 5) is block
    pool.free_blocks([block])
    pool.evict_blocks({7})
    assert not cached(pool, 5)


def test_of_two_blocks_with_one_content_each_is_known_by_its_own_number() -> None:
    pool = pool_of(10)
    first, second = take(pool, [3, 4])
    fill(pool, first, 5)
    fill(pool, second, 5)
    compat.exchange(pool, 3, 7)
    pool.evict_blocks({4})
    assert find(pool, 5) is first
    pool.evict_blocks({7})
    assert not cached(pool, 5)


def test_a_block_with_several_contents_is_found_by_each() -> None:
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    pool = pool_of(10)
    first, second = take(pool, [3, 4])
    fill(pool, first, 5)
    pool._insert_block_hash(make_block_hash_with_group_id(hash_of(6), 0), first, 8)
    fill(pool, second, 6)
    compat.exchange(pool, 3, 7)
    assert find(pool, 5) is first
    pool.evict_blocks({4})
    assert find(pool, 6) is first
    pool.evict_blocks({7})
    assert not cached(pool, 5) and not cached(pool, 6)
    assert not pool.cached_block_hashes_by_block


def test_sampled_metrics_follow() -> None:
    pool = pool_of(10)
    pool.metrics_collector = SimpleNamespace(block_metrics={3: "ours", 7: "the other's", 4: "neither's"})
    compat.exchange(pool, 3, 7)
    assert pool.metrics_collector.block_metrics == {7: "ours", 3: "the other's", 4: "neither's"}


def test_the_tables_are_those_of_all_who_hold_a_block_in_whatever_group() -> None:
    def blocks(*ids: int) -> list[Any]:
        return [SimpleNamespace(block_id=number) for number in ids]

    held: list[dict[str, list[Any]]] = [
        defaultdict(list, a=blocks(1, 2), b=blocks(2, 3), c=blocks(4), d=[]),
        defaultdict(list, a=blocks(0, 5), b=blocks(6, 7), c=blocks(8), d=[]),
    ]
    manager = SimpleNamespace(
        coordinator=SimpleNamespace(single_type_managers=[SimpleNamespace(req_to_blocks=h) for h in held]),
        get_block_ids=lambda name: tuple([block.block_id for block in each[name]] for each in held),
    )
    scheduler = SimpleNamespace(kv_cache_manager=manager)
    assert compat.tables_with(scheduler, {3, 8}) == {"b": ([2, 3], [6, 7]), "c": ([4], [8])}
    assert set(compat.tables_with(scheduler, {2})) == {"a", "b"}


def test_the_v1_runners_rows_are_written_when_the_device_has_the_ones_before() -> None:
    told: list[Any] = []
    runner = SimpleNamespace(
        prepare_inputs_event=SimpleNamespace(synchronize=lambda: told.append("waited")),
        requests={name: SimpleNamespace(block_ids=([0],)) for name in ("a", "b")},
        input_batch=SimpleNamespace(
            req_id_to_index={"a": 4},
            block_table=SimpleNamespace(add_row=lambda blocks, row: told.append((row, blocks))),
        ),
    )
    compat.write_tables(runner, {"a": ([1, 2],), "b": ([3],), "ended": ([5],)})
    assert told == ["waited", (4, ([1, 2],))]
    assert runner.requests["b"].block_ids == ([3],), "it is not in this step's batch, and comes back"


@pytest.mark.parametrize("split", [1, 2])
def test_the_v2_runners_rows_are_written_on_the_device_and_nothing_else_is(split: int) -> None:
    groups = [torch.full((5, 8), -1, dtype=torch.int32) for _ in range(2)]
    tables = SimpleNamespace(block_tables=[SimpleNamespace(gpu=group) for group in groups])
    if split > 1:  # as up to 0.28; later releases do not know it
        tables.blocks_per_kv_block = [1, split]
    runner = SimpleNamespace(
        req_states=SimpleNamespace(req_id_to_index={"a": 4, "b": 1, "c": 0}), block_tables=tables
    )
    compat.write_tables(runner, {"a": ([1, 2], [3]), "ended": ([5], [6]), "b": ([], [7, 8])})
    first, second = (group.clone() for group in groups)
    assert first[4].tolist() == [1, 2, *[-1] * 6]
    parts = [3] if split == 1 else [6, 7]
    assert second[4].tolist() == parts + [-1] * (8 - len(parts))
    parts = [7, 8] if split == 1 else [14, 15, 16, 17]
    assert second[1].tolist() == parts + [-1] * (8 - len(parts))
    first[4] = second[4] = second[1] = -1
    assert (first == -1).all() and (second == -1).all()


def test_nothing_is_written_to_a_v2_runner_that_has_none_of_the_requests() -> None:
    table = torch.full((5, 8), -1, dtype=torch.int32)
    runner = SimpleNamespace(
        req_states=SimpleNamespace(req_id_to_index={}),
        block_tables=SimpleNamespace(block_tables=[SimpleNamespace(gpu=table)]),
    )
    compat.write_tables(runner, {"ended": ([5],)})
    assert (table == -1).all()


def engine(*kinds: str, **more: Any) -> Any:
    groups = [SimpleNamespace(kv_cache_spec=type(kind, (), {})()) for kind in kinds]
    config: dict[str, Any] = {"speculative_config": None, "kv_transfer_config": None} | more
    config.setdefault("model_config", SimpleNamespace())
    return SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=groups), vllm_config=SimpleNamespace(**config)
    )


def drafting(method: str) -> SimpleNamespace:
    return SimpleNamespace(method=method)


def test_blocks_of_plain_attention_and_of_windows_move() -> None:
    assert compat.unmovable(engine("FullAttentionSpec")) is None
    assert compat.unmovable(engine("FullAttentionSpec", "SlidingWindowSpec")) is None
    assert compat.unmovable(engine("FullAttentionSpec", speculative_config=drafting("eagle"))) is None


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (engine("FullAttentionSpec", "MambaSpec"), "MambaSpec"),
        (engine("SinkFullAttentionSpec"), "SinkFullAttentionSpec"),
        (engine("CrossAttentionSpec", "FullAttentionSpec"), "CrossAttentionSpec"),
        (engine("FullAttentionSpec", speculative_config=drafting("custom_class")), "somebody's own"),
        (engine("FullAttentionSpec", kv_transfer_config=object()), "connector"),
        (
            engine("FullAttentionSpec", model_config=SimpleNamespace(enable_return_routed_experts=True)),
            "experts",
        ),
    ],
)
def test_where_something_else_is_kept_by_a_blocks_number_none_moves(what: Any, why: str) -> None:
    reason = compat.unmovable(what)
    assert reason is not None and why in reason


def test_routed_experts_are_seen_by_their_connector_in_later_releases() -> None:
    scheduler = engine("FullAttentionSpec")
    scheduler.aux_output_connector = object()
    assert "experts" in (compat.unmovable(scheduler) or "")


def test_this_release_has_what_a_move_touches() -> None:
    from vllm.v1 import kv_cache_interface
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.worker import gpu_input_batch, gpu_model_runner
    from vllm.v1.worker.block_table import MultiGroupBlockTable
    from vllm.v1.worker.gpu import model_runner, states
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

    assert all(hasattr(kv_cache_interface, kind) for kind in compat.MOVABLE)
    assert "self.req_to_blocks" in inspect.getsource(SingleTypeKVCacheManager.__init__)
    assert list(inspect.signature(KVCacheManager.get_block_ids).parameters) == ["self", "request_id"]
    rows = list(inspect.signature(MultiGroupBlockTable.add_row).parameters)
    assert rows == ["self", "block_ids", "row_idx"]
    assert "block_ids: tuple[list[int], ...]" in inspect.getsource(gpu_input_batch.CachedRequestState)
    assert "self.prepare_inputs_event" in inspect.getsource(gpu_model_runner.GPUModelRunner.__init__)
    tables = inspect.getsource(BlockTables)
    assert (
        "self.block_tables: list[StagedWriteTensor]" in tables
        and "(self.max_num_reqs, max_num_blocks)" in tables
    )
    assert ("self.blocks_per_kv_block = " in tables) == (compat.release() == "0.26")
    assert "self.gpu = torch.zeros(size, dtype=dtype, device=device)" in inspect.getsource(StagedWriteTensor)
    assert "req_id_to_index" in inspect.getsource(states.RequestState)
    v2, v1 = inspect.getsource(model_runner), inspect.getsource(gpu_model_runner)
    assert "self.block_tables = BlockTables(" in v2 and "self.input_batch = " not in v2
    assert "self.input_batch = InputBatch(" in v1 and "self.block_tables = " not in v1
