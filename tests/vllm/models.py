"""Kinds of models and features on the real engine: `python -m tests.vllm.models alone|shared KIND`.

Alone it is vLLM as it is; shared, its cache is on an arena of which somebody takes up to three quarters,
again and again. Prints a line of JSON a fact.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.vllm import shapes
from tests.vllm.engine import MiB, engine, fact, prompts, sampling
from tests.vllm.late_copies import Offloading, copy_late
from tests.vllm.pressing import Pressing

CACHE = 48 * MiB
SPEC = 3
# Kinds for which a GPU has no kernels in 32 bits. In 16 a token depends on which requests share its step.
HALVES = ("mla", "lora")


def rung(kind: str) -> str:
    """The dearest that may be asked for, if tokens are to be the same.

    A prompt and the tokens after it take two ways through latents, and in 16 bits through any cache, that
    differ by rounding: a request that is preempted answers otherwise, by vLLM itself too.
    """
    return "shrink" if kind == "mla" or halved(kind) else "pause"


def halved(kind: str) -> bool:
    """Whether it runs in 16 bits, one request at a time."""
    from vllm.platforms import current_platform

    return kind in HALVES and bool(current_platform.is_cuda())


# A chunk has 15 of its blocks: few enough that a squeeze meets requests.
LLAMA = shapes.SHAPES["tiny"] | {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    # DeepSeek-V2: one latent a token, and no heads.
    "mla": LLAMA
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 3,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "hidden_act": "silu",
    },
    # LFM2: every other layer keeps a state of fixed size instead of keys and values.
    "states": LLAMA
    | {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention"],
        "conv_L_cache": 3,
        "conv_bias": False,
        "conv_dim": 256,
        "block_dim": 256,
        "block_ff_dim": 512,
        "block_auto_adjust_ff_dim": False,
        "norm_eps": 1e-5,
    },
    "draft": LLAMA | {"num_hidden_layers": 1},
    "eagle": LLAMA | {"num_hidden_layers": 1, "architectures": ["EagleLlamaForCausalLM"]},
}


def speculating(folder: Path, method: str, shape: str | None = None) -> dict[str, Any]:
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": SPEC}
    if shape is None:
        config["prompt_lookup_max"] = SPEC
    else:
        config["model"] = str(shapes.write(shape, folder / shape))
    return {"speculative_config": config}


def connector(kind: str, folder: Path) -> dict[str, Any]:
    import torch

    if kind == "several":
        parts = [connector(each, folder) for each in ("offload", "simple_offload")]
        name, extra = "MultiConnector", {"connectors": parts}
    elif kind == "example_connector":
        name, extra = "ExampleConnector", {"shared_storage_path": str(folder / "stored")}
    else:
        late, name = {
            "simple_offload": (copy_late, "SimpleCPUOffloadConnector"),
            "offload": (Offloading, "OffloadingConnector"),
        }[kind]
        if not torch.cuda.is_available():
            late()
        extra = {"cpu_bytes_to_use": 64 * MiB}
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def arguments(kind: str, folder: Path) -> dict[str, Any]:
    """Of the engine, beyond what all of them have."""
    match kind:
        # One request at a time: on the CPU these kernels answer otherwise where a step has several prompts.
        case "mla":
            return {"max_num_seqs": 1}
        case "states":
            # vLLM sizes blocks so that one of either kind has as many bytes.
            return {"block_size": None, "max_num_seqs": 1}
        case "ngram":
            return speculating(folder, "ngram")
        case "draft":
            return speculating(folder, "draft_model", "draft")
        case "eagle":
            return speculating(folder, "eagle", "eagle")
        case "example_connector" | "simple_offload" | "offload" | "several":
            return {"kv_transfer_config": connector(kind, folder)}
        case "fp8":
            return {"kv_cache_dtype": "fp8_e4m3"}
        case "lora":
            return {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1, "max_cpu_loras": 1}
    return {}


def served(llm: Any, seed: int, **more: Any) -> list[list[int]]:
    asked = [{"prompt_token_ids": each["prompt_token_ids"][:150]} for each in prompts(seed, 8)]
    out = llm.generate(asked, sampling(20), use_tqdm=False, **more)
    fact("found elsewhere", sum(each.num_cached_tokens or 0 for each in out))
    return [list(each.outputs[0].token_ids) for each in out]


def adapter(folder: Path, number: int) -> Any:
    """A LoRA adapter of q_proj in every layer."""
    import torch
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    at = folder / f"adapter-{number}"
    at.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (at / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(number)
    wide, out = LLAMA["hidden_size"], LLAMA["num_attention_heads"] * LLAMA["head_dim"]
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(
            shape, generator=generator
        )
        for layer in range(LLAMA["num_hidden_layers"])
        for side, shape in (("A", (8, wide)), ("B", (out, 8)))
    }
    save_file(tensors, at / "adapter_model.safetensors")
    return LoRARequest(f"adapter-{number}", number, str(at))


def use(llm: Any, kind: str, folder: Path) -> list[Any]:
    """What each kind is there for; the answers are tokens."""
    import torch

    told: list[Any] = [served(llm, 1)]
    match kind:
        case "lora":
            # There is room for one: each is loaded in place of the one before.
            adapters = [adapter(folder, number) for number in (1, 2)]
            for each in (*adapters, adapters[0]):
                told.append(served(llm, 1, lora_request=each))
            told.append(llm.llm_engine.remove_lora(1))
            told.append(served(llm, 1))
        case "reload":
            model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
            kept = {name: each.data.clone() for name, each in model.get_model().named_parameters()}
            for factor in (1.25, 1.0):
                weights = [(name, factor * each) for name, each in kept.items()]
                asked = {"weights_iterator": weights, "is_checkpoint_format": False}
                with torch.no_grad():
                    llm.collective_rpc("reload_weights", kwargs=asked)
                told.append(llm.reset_prefix_cache())
                told.append(served(llm, 1))
        case "reset":
            for number, each in enumerate(prompts(3, 6)):
                llm.llm_engine.add_request(str(number), each, sampling(20))
            for _ in range(6):
                llm.llm_engine.step()
            told.append(llm.reset_prefix_cache(reset_running_requests=True))
            came: dict[str, list[int]] = {}
            while llm.llm_engine.has_unfinished_requests():
                for each in llm.llm_engine.step():
                    if each.finished:
                        came[each.request_id] = list(each.outputs[0].token_ids)
            told.append([came[name] for name in sorted(came)])
        case "example_connector" | "simple_offload":
            llm.reset_prefix_cache()
            told.append(served(llm, 1))
        case "offload" | "several":
            # What it is told to forget is copied yet, in the next step.
            for forgets in (False, True, False):
                llm.reset_prefix_cache(reset_connector=forgets)
                told.append(served(llm, 1))
        case _:
            told.append(served(llm, 2))
    return told


def main() -> None:
    how, kind = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["TEM_ENABLE"] = str(int(how == "shared"))
    os.dup2(2, 1)
    shapes.SHAPES.update(SHAPES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": CACHE}
        shape = kind if kind in ("mla", "states") else "llama"
        half = {"dtype": "bfloat16", "max_num_seqs": 1} if halved(kind) else {}
        llm = engine(folder, shape, **sizes | arguments(kind, folder) | half)
        core = llm.llm_engine.engine_core.engine_core
        groups = core.scheduler.kv_cache_config.kv_cache_groups
        fact("groups", [type(each.kv_cache_spec).__name__ for each in groups])
        fact("scheduler", type(core.scheduler).__name__)
        if how == "alone":
            fact("tokens", use(llm, kind, folder))
        else:
            with Pressing(core.model_executor.driver_worker.worker, rung(kind)) as other:
                fact("tokens", use(llm, kind, folder))
            fact("demands", other.met)
            fact("least", other.least)
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
