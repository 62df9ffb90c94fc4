"""Weights with which an engine's tokens tell whether its cache is right."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# What vLLM calls in each of its processes, as it calls the plugins that are installed.
PLUGINS = Path(__file__).with_name("plugins")
UNPACKED = "TESTS_UNPACKED_WEIGHTS"


def draw() -> None:
    """Has vLLM draw weights with which a token depends on all before it.

    Its own are so small, norms' included, that only the last token matters: an engine without a KV cache
    would answer the same.
    """
    from vllm.model_executor.model_loader import dummy_loader, weight_utils

    plain = weight_utils.initialize_single_dummy_weight
    if getattr(plain, "larger", False):
        return

    def draw(parameter: Any, *_: Any, **__: Any) -> None:
        plain(parameter, -0.1, 0.1)
        if parameter.dim() == 1:
            parameter.data.add_(1.0)

    draw.larger = True  # type: ignore[attr-defined]
    weight_utils.initialize_single_dummy_weight = draw
    dummy_loader.initialize_single_dummy_weight = draw


def leave_unpacked() -> None:
    """On the CPU: has weights lie where torch has them, in the processes too that vLLM starts.

    Packed copies lie outside of torch, and what points to them does not outlive sleep at level 2.
    """
    os.environ[UNPACKED] = "1"
    unpacked_where_asked()


def unpacked_where_asked() -> None:
    if os.environ.get(UNPACKED) == "1":
        from vllm import _custom_ops

        _custom_ops._supports_onednn = False


def draw_in_children() -> None:
    """Does so in the processes too that vLLM starts."""
    sys.path.append(str(PLUGINS))
    os.environ["PYTHONPATH"] = search_path()


def search_path() -> str:
    """The PYTHONPATH with which a process of vLLM's does so."""
    return os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(PLUGINS)]))
