"""Imports and includes point down. The two tables below are the order; everything else here reads files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "torch_elastic_mem"

# A module or folder of the package may import those of earlier rows, and its own inside.
PYTHON_LAYERS = (
    ("errors", "version"),
    ("units",),
    ("priority", "snapshot"),
    ("_C", "_torch", "_torch_cuda"),
    ("broker",),
    ("device", "elastic_range", "extension", "residency_check"),
    ("cpu_allocator",),
    ("account",),
    ("arena", "elastic_kv", "torch_hooks"),
    ("share_link", "weights"),
    ("block_pool", "defaults", "shared"),
    ("torch_cuda",),
    ("stowage",),
    ("__init__",),
    ("observe",),
    ("activate", "demo", "integrations", "screen"),
    ("cli",),
)
# What these must not import while they are imported themselves; inside a function they may.
NEVER_AT_IMPORT = {
    "__init__": {"torch", "rich", "matplotlib", "torch_elastic_mem._C"},
    "account": {"torch", "torch_elastic_mem.cpu_allocator"},
    "activate": {"torch", "torch_elastic_mem._C", "torch_elastic_mem.torch_cuda"},
    "arena": {"torch", "rich", "matplotlib"},
    "elastic_range": {"torch"},
    "share_link": {"torch"},
    "broker": {"torch", "rich", "matplotlib"},
    "cli": {
        "torch",
        "rich",
        "matplotlib",
        "torch_elastic_mem.demo",
        "torch_elastic_mem.broker",
        "torch_elastic_mem.observe",
        "torch_elastic_mem.screen",
        "torch_elastic_mem._C",
    },
    "observe": {"torch", "rich", "matplotlib"},
    "screen": {"torch", "matplotlib"},
}

# A folder of csrc/ may include itself and these.
CPP_INCLUDES = {
    "core": set(),
    "backend": {"core"},
    "ledger": {"core"},
    "arena": {"core", "backend", "ledger"},
    "alloc": {"core", "backend", "ledger", "arena"},
    "kv": {"core", "backend", "ledger", "arena"},
    "ipc": {"core", "backend", "ledger", "arena", "alloc"},
    "client": {"core", "backend", "ledger", "arena"},
    "broker": {"core", "ledger", "client"},
    "capi": {"core", "backend", "ledger", "arena", "alloc", "kv", "ipc"},
    "bindings": {"core", "backend", "ledger", "arena", "alloc", "kv", "ipc", "client", "broker", "capi"},
    "torch": {"capi/tem.h", "alloc/malloc.hpp", "core/error.hpp"},
}
# Headers from outside, by their first folder or whole name, and the folders that may know them.
CPP_FOREIGN = {
    "pybind11": {"bindings", "torch"},
    "Python.h": {"bindings", "torch"},
    "torch": {"torch"},
    "c10": {"torch"},
    "ATen": {"torch"},
    "cuda.h": set(),
    "cuda_runtime.h": set(),
    "cuda_runtime_api.h": set(),
}


def python_violations(package: Path) -> list[str]:
    """Every import in the package that the tables do not allow."""
    ranks = {name: rank for rank, names in enumerate(PYTHON_LAYERS) for name in names}
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        layer = relative.parts[0].removesuffix(".py")
        if layer not in ranks:
            found.append(f"{relative}: {layer} is in no layer")
            continue
        for line, target, at_import in imports(path):
            where = f"{relative}:{line}"
            banned = NEVER_AT_IMPORT.get(layer, ())
            if at_import and any(f"{target}.".startswith(f"{name}.") for name in banned):
                found.append(f"{where}: {layer} imports {target} while it is imported itself")
            if target.split(".")[0] != PACKAGE:
                continue
            reached = [*target.split("."), "__init__"][1]
            if reached not in ranks:
                found.append(f"{where}: {reached} is in no layer")
            elif reached != layer and ranks[reached] >= ranks[layer]:
                found.append(f"{where}: {layer} imports {reached}, which is not below it")
    return found


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, dotted module and whether it runs when the file is imported, of each import in a file."""
    tree = ast.parse(path.read_text())
    later = set()
    for node in ast.walk(tree):
        guarded = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if guarded or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            later |= {id(child) for statement in node.body for child in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write {PACKAGE}.…"
            # `from package import name` reaches the module `name`, where there is one.
            modules = [alias.name for alias in node.names if is_module(path, alias.name)]
            if node.module == PACKAGE and modules:
                targets = [f"{PACKAGE}.{name}" for name in modules]
            else:
                targets = [str(node.module)]
        else:
            continue
        for target in targets:
            yield node.lineno, target, id(node) not in later


def is_module(path: Path, name: str) -> bool:
    package = next(parent for parent in path.parents if parent.name == PACKAGE)
    return name.startswith("_") or (package / name).is_dir() or (package / f"{name}.py").exists()


def cpp_violations(csrc: Path) -> list[str]:
    """Every include in csrc/ that the tables do not allow."""
    found = []
    for path in sorted(path for pattern in ("*.cpp", "*.hpp", "*.h") for path in csrc.rglob(pattern)):
        relative = path.relative_to(csrc)
        folder = relative.parts[0]
        if folder not in CPP_INCLUDES:
            found.append(f"{relative}: {folder} is not in the table")
            continue
        allowed = CPP_INCLUDES[folder] | {folder}
        for number, text in enumerate(path.read_text().splitlines(), start=1):
            include = re.match(r'\s*#\s*include\s*([<"])([^">]+)[">]', text)
            if not include:
                continue
            kind, header = include.groups()
            where = f"{relative}:{number}"
            first = header.split("/")[0]
            if kind == "<":
                if folder not in CPP_FOREIGN.get(first, {folder}):
                    found.append(f"{where}: {folder} may not know <{header}>")
            elif not (csrc / header).is_file():
                found.append(f'{where}: "{header}" is no file under csrc/; a header from outside takes <>')
            elif not allowed & {first, header}:
                found.append(f"{where}: {folder} may not include {header}")
    return found


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_python_imports_point_down() -> None:
    assert python_violations(ROOT / PACKAGE) == []


def test_cpp_includes_point_down() -> None:
    assert cpp_violations(ROOT / "csrc") == []


def test_python_violations_are_found(tmp_path: Path) -> None:
    package = write(
        tmp_path / PACKAGE,
        {
            "units.py": "from torch_elastic_mem.errors import A\nfrom torch_elastic_mem.arena import Arena\n",
            "arena.py": "def f():\n    import torch\nimport torch.cuda\n",
            "priority.py": "import torch_elastic_mem\nfrom torch_elastic_mem import errors, elastic_kv\n",
            "elastic_kv.py": "import torch\nfrom torch_elastic_mem.torch_hooks import x\n",
            "errors.py": "",
            "stray.py": "",
            "cli/main.py": (
                "import torch_elastic_mem.cli.demo\n"
                "from torch_elastic_mem.demo.main import run_demo\n"
                "def f():\n    from torch_elastic_mem.demo.main import run_demo\n"
            ),
        },
    )
    assert python_violations(package) == [
        "arena.py:3: arena imports torch.cuda while it is imported itself",
        "cli/main.py:2: cli imports torch_elastic_mem.demo.main while it is imported itself",
        "elastic_kv.py:2: elastic_kv imports torch_hooks, which is not below it",
        "priority.py:1: priority imports __init__, which is not below it",
        "priority.py:2: priority imports elastic_kv, which is not below it",
        "stray.py: stray is in no layer",
        "units.py:2: units imports arena, which is not below it",
    ]


def test_cpp_violations_are_found(tmp_path: Path) -> None:
    csrc = write(
        tmp_path / "csrc",
        {
            "core/sizes.hpp": "#include <vector>\n#pragma once\n",
            "ledger/ledger.hpp": '#include "core/sizes.hpp"\n#include "backend/backend.hpp"\n',
            "backend/backend.hpp": "#include <cuda.h>\n",
            "kv/kv.hpp": '#include "sizes.hpp"\n#include "alloc/cache.hpp"\n#include <pybind11/pybind11.h>\n',
            "alloc/cache.hpp": "",
            "capi/tem.h": "",
            "capi/detail.hpp": "",
            "torch/cpu.cpp": '#include <c10/util.h>\n#include "capi/tem.h"\n#include "capi/detail.hpp"\n',
            "extra/thing.cpp": "",
        },
    )
    assert cpp_violations(csrc) == [
        "backend/backend.hpp:1: backend may not know <cuda.h>",
        "extra/thing.cpp: extra is not in the table",
        'kv/kv.hpp:1: "sizes.hpp" is no file under csrc/; a header from outside takes <>',
        "kv/kv.hpp:2: kv may not include alloc/cache.hpp",
        "kv/kv.hpp:3: kv may not know <pybind11/pybind11.h>",
        "ledger/ledger.hpp:2: ledger may not include backend/backend.hpp",
        "torch/cpu.cpp:3: torch may not include capi/detail.hpp",
    ]


def test_the_readme_of_csrc_has_the_same_table() -> None:
    rows = re.findall(r"^\| `(\w+)/` \|", (ROOT / "csrc" / "README.md").read_text(), re.MULTILINE)
    assert rows == list(CPP_INCLUDES)
