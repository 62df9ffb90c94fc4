"""Models by what their layers keep, planned by vLLM itself: its configuration, its scheduler, its warm-up."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.utils.hashing import sha256
from vllm.v1 import kv_cache_interface as kinds
from vllm.v1.core import kv_cache_utils

import torch_elastic_mem as tem
from benchmarks.vllm import shapes
from torch_elastic_mem.integrations.vllm import compat, compat_layers, registry
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.worker import first_blocks

if "shared_by" in {field.name for field in fields(kinds.KVCacheTensor)}:
    pytest.skip("layouts have names from 0.29 on", allow_module_level=True)

MiB = 1 << 20
MEMORY = 96 * MiB
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DRAFTS = 2


def full(dtype: torch.dtype = BF16, size: int = 16, **more: Any) -> Any:
    return kinds.FullAttentionSpec(block_size=size, num_kv_heads=8, head_size=128, dtype=dtype, **more)


def latent(dtype: torch.dtype = BF16) -> Any:
    return kinds.MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=dtype)


def window() -> Any:
    return kinds.SlidingWindowSpec(
        block_size=16, num_kv_heads=8, head_size=128, dtype=BF16, sliding_window=128
    )


def state(mode: str, drafts: int = 0) -> Any:
    """Of a Mamba layer, padded to the bytes of a block of attention beside it."""
    attention = full(size=64)
    return kinds.MambaSpec(
        block_size=64 if mode == "align" else 2048,
        shapes=((3, 1024), (15, 64, 64)),
        dtypes=(BF16, torch.float32),
        page_size_padded=attention.page_size_bytes,
        mamba_cache_mode=mode,
        num_speculative_blocks=drafts,
    )


def layers(**specs: list[Any]) -> dict[str, Any]:
    return {f"{name}.{number}": spec for name, each in specs.items() for number, spec in enumerate(each)}


MODELS: dict[str, dict[str, Any]] = {
    "dense": layers(attention=[full()] * 4),
    "fp8": layers(attention=[full(FP8)] * 4),
    "latent": layers(attention=[latent()] * 4),
    "latent fp8": layers(attention=[latent(FP8)] * 4),
    "windows": layers(attention=[full()] * 2, window=[window()] * 4),
    "windows that do not divide": layers(attention=[full()] * 2, window=[window()] * 5),
    "states": layers(state=[state("none")] * 3, attention=[full(size=64)]),
    "states in step with blocks": layers(state=[state("align")] * 3, attention=[full(size=64)]),
    "states and drafts": layers(state=[state("align", DRAFTS)] * 3, attention=[full(size=64)] * 2),
    "a draft model of other heads": layers(
        attention=[full()] * 3,
        draft=[kinds.FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=128, dtype=BF16)],
    ),
    "blocks larger than an extent": layers(attention=[full(size=128)] * 32),
}


@pytest.fixture(scope="module")
def engine_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEM_ENABLE", "0")
        return EngineArgs(
            model=str(shapes.write("tiny", tmp_path_factory.mktemp("model"))),
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=8,
            max_num_batched_tokens=256,
        ).create_engine_config()


@pytest.fixture(params=["LBHNC", "BLHNC"])
def layout(request: pytest.FixtureRequest, engine_config: Any) -> str:
    engine_config.cache_config.kv_cache_layout = request.param
    return str(request.param)


def planned(engine_config: Any, model: str) -> Any:
    """The plan of vLLM."""
    states = [spec for spec in MODELS[model].values() if isinstance(spec, kinds.MambaSpec)]
    modes = {spec.mamba_cache_mode for spec in states}
    engine_config.cache_config.mamba_cache_mode = max(modes, default="none")
    # vLLM caches no prefixes where it keeps only the last state of a request.
    engine_config.cache_config.enable_prefix_caching = "none" not in modes
    engine_config.cache_config.block_size = min(
        each.block_size for each in MODELS[model].values() if not isinstance(each, kinds.MambaSpec)
    )
    memory = 24 * 32 * 8 * MiB if model.startswith("blocks larger") else MEMORY
    (config,) = kv_cache_utils.get_kv_cache_configs(engine_config, [dict(MODELS[model])], [memory])
    return config


@pytest.mark.parametrize("model", MODELS)
def test_each_layers_bytes_of_a_block_lie_where_its_memory_comes_and_goes(
    engine_config: Any, layout: str, model: str
) -> None:
    config = planned(engine_config, model)
    try:
        (region,) = compat.regions(config)
    except compat.Unsupported:
        assert not layout.startswith("B"), "where blocks are outermost all models are served"
        return
    assert region.bytes == config.kv_cache_tensors[0].size
    part = region.block_bytes * config.num_blocks
    specs = {name: spec for group in config.kv_cache_groups for name, spec in named(group)}
    assert specs.keys() == MODELS[model].keys()
    for tensor in config.kv_cache_tensors:
        for number, name in enumerate(tensor.layers):
            for block in (0, 1, config.num_blocks - 1):
                first = tensor.offset + number * tensor.layer_stride + block * tensor.block_stride
                last = first + specs[name].page_size_bytes - 1
                for byte in (first, last):
                    assert byte < region.bytes and byte % part // region.block_bytes == block


def named(group: Any) -> list[tuple[str, Any]]:
    spec = group.kv_cache_spec
    return [(name, getattr(spec, "kv_cache_specs", {name: spec})[name]) for name in group.layer_names]


class Served:
    """The scheduler of vLLM with ours mixed in, over its plan of a model, and somebody who takes memory."""

    def __init__(self, engine_config: Any, config: Any) -> None:
        from vllm.v1.structured_output import StructuredOutputManager

        from torch_elastic_mem.integrations.vllm.scheduler import ElasticScheduler

        self.arena = tem.Arena("host", capacity=MEMORY, reserve=(0, 0), broker=None)
        account = self.arena.account("engine", "serving")
        self.cache = ElasticCache(account, config.num_blocks, compat.regions(config))
        ahead = first_blocks(engine_config, config)
        self.cache.ensure(range(-(-ahead // self.cache.chunk_blocks)))
        registry.keep(engine_config.instance_id, self.cache)
        config = kv_cache_utils.generate_scheduler_kv_cache_config([config])
        engine_config.cache_config.num_gpu_blocks = config.num_blocks
        size, hashed = kv_cache_utils.resolve_kv_cache_block_sizes(config, engine_config)
        config.hash_block_size = hashed
        self.scheduler = ElasticScheduler(
            engine_config, config, StructuredOutputManager(engine_config), size, hashed
        )
        kv_cache_utils.init_none_hash(sha256)
        self.came = 0
        self.hasher = kv_cache_utils.get_request_block_hasher(hashed, sha256)
        self.pressing = self.arena.account("pressing", tem.PriorityClass("pressing", 10**6)).range("1GiB")

    def add(self, name: str, length: int, seed: int) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        rng = random.Random(seed)
        sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        tokens = [rng.randrange(3, 1000) for _ in range(length)]
        self.scheduler.add_request(Request(name, tokens, sampling, None, block_hasher=self.hasher))

    def press(self, wanted: int) -> None:
        with contextlib.suppress(tem.OutOfMemory):
            self.pressing.grow(wanted, timeout=60.0)

    def step(self) -> set[int]:
        """A step whose requests all get a token; the blocks that it may touch without memory under them."""
        from vllm.v1.outputs import ModelRunnerOutput

        output = self.scheduler.schedule()
        manager = self.scheduler.kv_cache_manager
        touched = {
            block
            for name in output.num_scheduled_tokens
            for group in manager.get_block_ids(name)
            for block in group
        } | set(output.new_block_ids_to_zero or ())
        # Until its work is on the stream: behind that, what ends with it may go at once.
        lacking = touched & self.without_memory()
        self.cache.on_enqueued()
        names = list(output.num_scheduled_tokens)
        asked = [self.scheduler.requests[name] for name in names]
        sampled = [[7] if each.num_computed_tokens >= each.num_tokens else [] for each in asked]
        places = {name: at for at, name in enumerate(names)}
        self.scheduler.update_from_output(output, ModelRunnerOutput(names, places, sampled))
        self.came += sum(each.is_finished() for each in asked)
        return lacking

    def without_memory(self) -> set[int]:
        ((part, layers),) = self.cache._parts
        blocks = self.cache.num_blocks
        return {at % blocks for at in range(layers * blocks) if not part.is_resident(at)}

    def close(self, engine_config: Any) -> None:
        self.scheduler.elastic.close()
        registry.forget(engine_config.instance_id)


@pytest.fixture
def served(engine_config: Any, layout: str, request: pytest.FixtureRequest) -> Iterator[Served]:
    config = planned(engine_config, request.param)
    try:
        compat.regions(config)
    except compat.Unsupported as reason:
        pytest.skip(str(reason))
    made = Served(engine_config, config)
    yield made
    made.close(engine_config)


@pytest.mark.parametrize("served", [name for name in MODELS if not name.startswith("blocks")], indirect=True)
def test_no_step_touches_a_block_without_memory_however_it_is_squeezed(served: Served) -> None:
    rng, met, least = random.Random(5), 0, served.cache.num_chunks
    for number in range(56):
        if number < 40 and number % 2 == 0:
            served.add(str(number), rng.randrange(20, 500), seed=number // 6)
        if number % 7 == 3:
            wanted = rng.randrange(MEMORY // 2, MEMORY * 3 // 4) // (2 * MiB) * 2 * MiB
            demand = threading.Thread(target=served.press, args=(wanted,))
            demand.start()
        assert not served.step()
        if number % 7 == 5:
            while demand.is_alive():
                assert not served.step()
                demand.join(0.01)
            met += served.pressing.mapped > 0
            least = min(least, len(served.scheduler.elastic.balloon.resident()))
            if served.pressing.mapped:
                served.pressing.shrink(served.pressing.mapped)
    # Latents are no power of two: where layers are outermost, such a small cache has three chunks.
    chunks = served.cache.num_chunks
    assert (met >= 4 and least < chunks // 2) if chunks > 3 else (met >= 1 and least < chunks)
    while served.scheduler.has_unfinished_requests():
        assert not served.step()
    assert served.scheduler.elastic.balloon.in_use() == 0
    assert served.came == 20


@pytest.mark.parametrize(
    "served", [name for name in MODELS if "window" in name or "state" in name], indirect=True
)
def test_of_windows_and_states_a_long_prompt_needs_what_vllm_admits_it_by(served: Served) -> None:
    served.add("long", 1000, seed=1)
    (request,) = served.scheduler.waiting
    needed, taken = served.scheduler._blocks_of(request), 0
    while not request.output_token_ids:
        assert not served.step()
        taken = max(taken, served.scheduler.elastic.balloon.in_use())
    groups = len(served.scheduler.kv_cache_config.kv_cache_groups)
    assert taken <= needed <= taken + 3 * groups


@pytest.mark.parametrize("served", ["dense"], indirect=True)
def test_what_others_hold_of_a_long_prompt_is_not_to_be_had_once_more(served: Served) -> None:
    served.add("first", 1000, seed=1)
    while served.scheduler.requests["first"].num_computed_tokens < 1000:
        assert not served.step()
    served.add("alike", 1001, seed=1)
    served.add("another", 1001, seed=2)
    alike, another = served.scheduler.waiting
    assert served.scheduler._blocks_of(another) == 64
    assert served.scheduler._blocks_of(alike) == 2
    alike.skip_reading_prefix_cache = True
    assert served.scheduler._blocks_of(alike) == 64


@pytest.mark.parametrize("served", ["dense"], indirect=True)
def test_a_long_prompt_is_made_room_for_behind_who_waits_for_its_client(served: Served) -> None:
    from vllm.v1.request import RequestStatus

    for name, length in (("session", 40), ("long", 1800)):
        served.add(name, length, seed=3)
    session, long = served.scheduler.waiting
    session.status = RequestStatus.WAITING_FOR_STREAMING_REQ
    assert served.scheduler._first_waiting() == served.scheduler._blocks_of(long) == 114
    assert served.scheduler._needs().most < 2 * 114


@pytest.mark.parametrize("drafts", [0, 1, 3, 7, 16])
@pytest.mark.parametrize("seqs", [2, 64, 256])
@pytest.mark.parametrize("model", ["dense", "windows", "states", "states and drafts"])
def test_vllms_warm_up_stays_within_the_first_blocks(
    monkeypatch: pytest.MonkeyPatch, model: str, seqs: int, drafts: int
) -> None:
    from vllm.v1.worker.gpu import warmup

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    specs = {name.partition(".")[0]: spec for name, spec in MODELS[model].items()}.values()
    if any(compat_layers.states(spec) for spec in specs):
        drafts = DRAFTS
    speculating = SimpleNamespace(num_speculative_tokens=drafts) if drafts else None
    scheduling = SimpleNamespace(max_num_seqs=seqs, max_num_batched_tokens=2048)
    config = SimpleNamespace(
        num_blocks=10**6, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    )
    used: set[int] = set()

    def execute(output: Any) -> None:
        for each in output.scheduled_new_reqs:
            used.update(block for group in each.block_ids for block in group)
        for each in output.scheduled_cached_reqs.new_block_ids:
            used.update(block for group in each or () for block in group)

    runner = SimpleNamespace(
        adaptive_verification=None,
        block_tables=None,
        decode_query_len=1 + drafts,
        is_encoder_decoder=False,
        is_last_pp_rank=False,
        is_pooling_model=False,
        kv_block_zeroer=None,
        kv_cache_config=config,
        kv_connector=SimpleNamespace(set_disabled=lambda _: None),
        max_model_len=2048,
        max_num_reqs=seqs,
        model_state=None,
        num_speculative_steps=drafts,
        rejection_sampler=None,
        scheduler_config=scheduling,
        speculative_config=speculating,
        vllm_config=SimpleNamespace(is_mm_encoder_only=False, num_lookahead_tokens=drafts),
    )
    warmup.warmup_kernels(runner, execute, lambda _: None)
    warmup.run_mixed_prefill_decode_warmup(runner, execute, lambda _: None, 2048)
    engine = SimpleNamespace(scheduler_config=scheduling, speculative_config=speculating)
    assert used and max(used) < first_blocks(engine, config)


@pytest.mark.parametrize("how", ["of another kind", "of another kind within a group", "in host memory"])
def test_a_cache_that_may_be_read_where_nobody_holds_it_is_refused(how: str) -> None:
    specs = layers(attention=[full()])
    group = SimpleNamespace(kv_cache_spec=full())
    tensor = SimpleNamespace(host_resident=how == "in host memory")
    if how != "in host memory":
        other = kinds.CrossAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=BF16)
        group.kv_cache_spec = other
        if how.endswith("group"):
            group.kv_cache_spec = SimpleNamespace(kv_cache_specs=specs | {"other": other})
    config = SimpleNamespace(kv_cache_groups=[group], kv_cache_tensors=[tensor])
    with pytest.raises(compat.Unsupported, match=r"CrossAttentionSpec|host memory"):
        compat_layers.require_known_layers(compat.specs(config))
        compat_layers.require_on_device(config)
