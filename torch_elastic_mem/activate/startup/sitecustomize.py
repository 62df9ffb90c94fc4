"""Read by Python at its start under `tem run`; see `torch_elastic_mem.activate`.

Nothing but the standard library is imported before the program imports torch.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class TorchFinder:
    """A meta path finder that has `install` called once torch has been imported, and then goes away."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds torch as the other finders do, with a loader that calls back. All else is theirs."""
        if name != "torch":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    install()

            # On the object: its class stays what the program expects to see.
            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Installs the allocator, or says in a line why not."""
    try:
        from torch_elastic_mem.activate.install import install

        install()
    except Exception as error:  # noqa: BLE001  (whatever it is, the program is not to die of it)
        reason = " ".join(str(error).split())
        print(f"tem run: torch keeps its own memory in process {os.getpid()}: {reason}", file=sys.stderr)


def load_shadowed() -> None:
    """Loads the sitecustomize that Python would have found without this one."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("TEM_ENABLE") == "1":
    sys.meta_path.insert(0, TorchFinder())
load_shadowed()
