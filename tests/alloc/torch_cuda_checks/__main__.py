"""Runs one group; `__init__.py` says how."""

from __future__ import annotations

import json
import sys
from importlib import import_module

import torch

import torch_elastic_mem as tem
from tests.programs import report

from .answers import answers
from .harness import CAPACITY, CHECKS, native


def install() -> tem.Arena:
    arena = tem.Arena("cuda", capacity=CAPACITY)
    account = arena.account("training")
    torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", account))
    return arena


def main() -> None:
    name = sys.argv[1]
    if name == "native":
        torch.cuda.init()
        print(json.dumps(answers()))
        return
    native.update(json.load(sys.stdin))
    _arena = install()
    import_module(f"{__package__}.{name}")
    report(CHECKS, torch.cuda.synchronize)


if __name__ == "__main__":
    main()
