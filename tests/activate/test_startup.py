"""What an interpreter under `tem run` does, and that no other does anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.activate.conftest import Program

SERVED = "['an allocator over accounts']\n"
OPENED = (
    "['an allocator over accounts', 'CUDA is initialised', (0, 'training of class training on cuda:0')]\n"
)


def test_torch_has_the_allocator_when_its_import_ends_and_the_account_when_cuda_starts(
    program: Program,
) -> None:
    done = program("import torch\nprint(torch.log)\ntorch.init()\nprint(torch.log)")
    assert (done.returncode, done.stdout, done.stderr) == (0, SERVED + OPENED, "")


def test_options_and_variables_name_the_account(program: Program) -> None:
    code = "import torch; torch.init(); print(torch.log[2:])"
    said = "[(1, 'night of class idle on cuda:1'), (2, 'night of class idle on cuda:2')]\n"
    options = ["--priority", "idle", "--name", "night", "--device", "cuda:1", "--device", "cuda:2"]
    assert program(code, *options).stdout == said
    named = {"TEM_PRIORITY": "idle", "TEM_NAME": "night", "TEM_DEVICE": "cuda:1,cuda:2"}
    assert program(code, **named).stdout == said
    assert program(code, "--priority", "serving", **named).stdout == said.replace("idle", "serving")


def test_a_launcher_s_rank_names_the_device(program: Program) -> None:
    done = program("import os, torch\nos.environ['LOCAL_RANK'] = '3'\ntorch.init(); print(torch.log[-1])")
    assert done.stdout == "(3, 'training of class training on cuda:3')\n"


def test_the_program_sees_no_trace(program: Program) -> None:
    code = """
        import importlib.machinery, importlib.util, sys
        import torch
        assert type(torch.__spec__.loader) is importlib.machinery.SourceFileLoader
        kinds = {type(finder).__name__ for finder in sys.meta_path}
        assert "TorchFinder" not in kinds, kinds
        assert not any("startup" in path for path in sys.path), sys.path
        import inspect
        assert "_CUDAAllocator" in inspect.getsource(torch)
    """
    done = program(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_looking_for_torch_is_not_importing_it(program: Program) -> None:
    code = """
        import importlib.util, sys
        assert importlib.util.find_spec("torch").origin.endswith("__init__.py")
        assert "torch" not in sys.modules and importlib.util.find_spec("numpyy") is None
        import torch
        print(torch.log)
    """
    assert program(code).stdout == SERVED


def test_an_import_of_torch_that_failed_is_waited_for_again(program: Program) -> None:
    code = """
        import os
        os.environ["TORCH_DOES"] = "raise ImportError('no libcublas')"
        try: import torch
        except ImportError as error: print(error)
        del os.environ["TORCH_DOES"]
        import sys
        for name in [name for name in sys.modules if "elastic" in name]: del sys.modules[name]
        import torch
        print(torch.log)
    """
    assert program(code).stdout == "no libcublas\n" + SERVED


def test_a_program_without_torch_is_left_alone(program: Program) -> None:
    done = program("import sys; print([m for m in sys.modules if m.startswith('torch')])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


CHILDREN = {
    "subprocess": (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import torch; print(torch.log)'])"
    ),
    "through a shell": (
        "import os, subprocess, sys; subprocess.run(['/bin/sh', '-c', "
        "f'{sys.executable} -c \"import torch; print(torch.log)\"'])"
    ),
    "exec": "import os, sys; os.execv(sys.executable, ['python', '-c', 'import torch; print(torch.log)'])",
}


@pytest.mark.parametrize("name", CHILDREN)
def test_children_are_served(program: Program, name: str) -> None:
    done = program(CHILDREN[name])
    assert (done.stdout, done.stderr) == (SERVED, "")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_of_multiprocessing_are_served(program: Program, method: str) -> None:
    code = f"""
        import multiprocessing
        def work():
            import torch
            print(torch.log, flush=True)
        if __name__ == "__main__":
            child = multiprocessing.get_context({method!r}).Process(target=work)
            child.start(); child.join()
            assert child.exitcode == 0
    """
    done = program(code)
    assert (done.stdout, done.stderr) == (SERVED, "")


def test_a_fork_before_cuda_starts_opens_an_account_of_its_own(program: Program) -> None:
    code = """
        import os, torch
        for _ in range(2):
            if os.fork() == 0:
                torch.init(); print(torch.log, flush=True); os._exit(0)
            os.wait()
        torch.init(); print(torch.log, flush=True)
    """
    done = program(code)
    assert (done.stdout, done.stderr) == (OPENED * 3, "")


@pytest.mark.parametrize("flag", ["-I", "-S", "-E"])
def test_an_interpreter_that_is_told_to_look_at_nothing_does_not(program: Program, flag: str) -> None:
    code = """
        import sys
        sys.path.insert(0, sys.argv[0].replace("program.py", "stub"))
        import torch
        print(torch.log)
    """
    done = program(code, flags=(flag,))
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_without_tem_run_nothing_happens(program: Program) -> None:
    code = "import sys, torch; print(torch.log, [f for f in sys.meta_path if 'Torch' in type(f).__name__])"
    for variables in ({}, {"TEM_ENABLE": "1", "TEM_PRIORITY": "training"}):
        done = program(code, before=[], **variables)
        assert (done.stdout, done.stderr) == ("[] []\n", "")


def test_a_program_can_switch_it_off_for_its_children(program: Program) -> None:
    done = program("import os\nos.environ['TEM_ENABLE'] = '0'\n" + CHILDREN["subprocess"])
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.fixture
def shadowed(stub: Path) -> Path:
    """Where another product's sitecustomize lies."""
    return stub / "sitecustomize.py"


def test_another_sitecustomize_still_runs(program: Program, shadowed: Path) -> None:
    shadowed.write_text("import sys; sys.seen = __file__")
    done = program(
        "import sitecustomize, sys, torch\nassert sys.seen == sitecustomize.__file__\nprint(torch.log)"
    )
    assert (done.stdout, done.stderr) == (SERVED, "")


def test_another_sitecustomize_that_looks_for_a_further_one_does_not_find_ours(
    program: Program, shadowed: Path
) -> None:
    shadowed.write_text(
        "import os, sys\nsys.count = getattr(sys, 'count', 0) + 1\n"
        "sys.path.remove(os.path.dirname(__file__)); me = sys.modules.pop('sitecustomize')\n"
        "try: import sitecustomize\nexcept ImportError: sys.modules['sitecustomize'] = me\n"
        "sys.path.insert(0, os.path.dirname(__file__))"
    )
    done = program("import sys, torch; print(torch.log); assert sys.count == 1")
    assert (done.stdout, done.stderr) == (SERVED, "")


def test_another_sitecustomize_that_fails_does_so_as_ever(program: Program, shadowed: Path) -> None:
    shadowed.write_text("1 / 0")
    code = "import torch; print(torch.log)"
    alone, under = program(code, before=[]), program(code)
    assert (alone.stdout, under.stdout) == ("[]\n", SERVED)
    assert under.stderr == 2 * alone.stderr != ""  # once more for `tem` itself


FAILURES = {
    "sys.modules['torch_elastic_mem._torch_cuda'].TORCH_VERSION = '9.8'": (
        "the torch extension _torch_cuda was built for torch 9.8, and this is torch 9.9"
    ),
    "sys.modules['torch_elastic_mem._torch_cuda'] = None": "the torch extension _torch_cuda cannot be loaded",
    "sys.modules['torch_elastic_mem'] = None": "No module named 'torch_elastic_mem.activate'",
    "cuda.memory.get_allocator_backend = lambda: 'cudaMallocAsync'": "(backend:cudaMallocAsync)",
    "cuda.memory.get_allocator_backend = lambda: 'pluggable'": "has the allocator 'pluggable' already",
    "cuda.is_initialized = lambda: True": "torch has initialised CUDA already",
    "__import__('os').environ['TEM_PRIORITY'] = 'urgent'": "TEM_PRIORITY: no priority class 'urgent'",
}


@pytest.mark.parametrize("cause", FAILURES)
def test_what_cannot_work_is_one_line_and_the_program_runs(program: Program, cause: str) -> None:
    done = program("import torch; print(torch.log)", TORCH_DOES=cause)
    assert (done.returncode, done.stdout) == (0, "[]\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tem run: torch keeps its own memory in process ")
    assert FAILURES[cause] in line


def test_a_torch_without_cuda_is_left_alone(program: Program) -> None:
    done = program("import torch; print(torch.log)", TORCH_DOES="version.cuda = None")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_program_with_the_two_lines_keeps_its_own_account(program: Program) -> None:
    code = """
        import torch, torch_elastic_mem as tem
        torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", priority="idle"))
        torch.init()
        print(torch.log[1:])
    """
    done = program(code)
    assert done.stderr == ""
    assert done.stdout == (
        "['an allocator over accounts', 'CUDA is initialised', (0, 'idle of class idle on cuda')]\n"
    )


def test_with_the_real_torch_a_program_without_cuda_runs_as_ever(program: Program, stub: Path) -> None:
    import torch

    shutil.rmtree(stub / "torch")
    code = """
        import torch
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        model(torch.ones(2, 8)).sum().backward()
        print(float(model.weight.grad.sum()))
        assert "libcuda.so" not in open("/proc/self/maps").read()
    """
    alone, under = program(code, before=[]), program(code)
    assert (under.stdout, under.returncode) == (alone.stdout, 0)
    if torch.version.cuda is None:
        assert under.stderr == ""
