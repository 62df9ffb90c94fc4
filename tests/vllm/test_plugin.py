"""What vLLM's entry point does: classes are chosen where all is known, and nothing is changed where not."""

from __future__ import annotations

import importlib
import importlib.metadata
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from tests.broker.service import Service
from tests.programs import ROOT
from torch_elastic_mem.errors import BrokerError, InvalidArgument
from torch_elastic_mem.integrations.vllm import connectors, plugin, variables
from torch_elastic_mem.integrations.vllm.compat import Unsupported

GPU, CPU = plugin.WORKERS
EXECUTOR = f"{plugin.HERE}.executor.ElasticExecutor"
SCHEDULERS = [f"{plugin.HERE}.scheduler.{name}" for name in ("ElasticScheduler", "ElasticAsyncScheduler")]


def config(worker: str = CPU, *, asynchronous: bool = False) -> Any:
    """A configuration that is served, with what is looked at of it."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            world_size=1,
            data_parallel_size=1,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            nnodes=1,
            worker_cls=worker,
            distributed_executor_backend="uni",
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=None, async_scheduling=asynchronous),
        model_config=SimpleNamespace(enable_sleep_mode=False, runner_type="generate"),
        load_config=SimpleNamespace(load_format="auto"),
        kv_transfer_config=None,
        speculative_config=None,
    )


def ranks(*, asynchronous: bool = False) -> Any:
    """Two, on GPUs of one machine."""
    made = config(GPU, asynchronous=asynchronous)
    made.parallel_config.world_size, made.parallel_config.distributed_executor_backend = 2, "mp"
    return made


def sleeping(backend: str = "cumem", **more: Any) -> Any:
    return SimpleNamespace(enable_sleep_mode=True, sleep_mode_backend=backend, runner_type="generate", **more)


def connector(name: str | None, module: str | None = None) -> Any:
    return SimpleNamespace(kv_connector=name, kv_connector_module_path=module, kv_connector_extra_config={})


def with_other(path: str, value: object) -> Any:
    made = config()
    *parts, name = path.split(".")
    owner = getattr(made, parts[0]) if parts else made
    assert hasattr(owner, name)
    setattr(owner, name, value)
    return made


def chosen(made: Any) -> tuple[Any, Any, Any]:
    parallel = made.parallel_config
    return parallel.worker_cls, made.scheduler_config.scheduler_cls, parallel.distributed_executor_backend


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(plugin.log, "warning", lambda text, *args: told.append(text % args))
    return told


@pytest.fixture
def engine_args(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What vLLM's own `create_engine_config` answers, in turn; ours, if it comes, goes with the test."""
    answers: list[Any] = []
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self, *args, **kwargs: answers.pop(0))
    monkeypatch.setenv("TEM_ENABLE", "1")
    monkeypatch.setenv("TEM_BROKER", "0")
    return answers


def created() -> Any:
    return EngineArgs.create_engine_config(SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("worker", [GPU, CPU])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("backend", ["uni", "mp", None])
def test_one_rank_gets_our_worker_beside_our_scheduler(
    worker: str, asynchronous: bool, backend: str | None
) -> None:
    made = config(worker, asynchronous=asynchronous)
    made.parallel_config.distributed_executor_backend = backend
    plugin.choose_classes(made)
    assert chosen(made) == (plugin.WORKERS[worker], SCHEDULERS[asynchronous], "uni")


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("parallel_config.data_parallel_size", 2, "data parallel"),
        ("parallel_config.prefill_context_parallel_size", 2, "context parallel"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallel"),
        ("parallel_config.nnodes", 2, "several machines"),
        ("parallel_config.worker_cls", "mine.Worker", "a worker class of its own, mine.Worker"),
        ("parallel_config.worker_cls", plugin.WORKERS[CPU], "a worker class of its own"),
        ("parallel_config.distributed_executor_backend", "ray", "started by ray"),
        ("parallel_config.distributed_executor_backend", SimpleNamespace, "started by"),
        ("scheduler_config.scheduler_cls", "mine.Scheduler", "a scheduler class of its own, mine.Scheduler"),
        ("model_config", sleeping("mine"), "a backend of its own, mine"),
        ("model_config", sleeping(sleep_mode_offload_cudagraph=True), "sleeps under `tem run` only"),
        ("model_config", sleeping(enable_nccl_comm_suspend=True), "suspend their communicators together"),
        ("model_config.runner_type", "pooling", "pooling"),
        ("load_config.load_format", "ipc_cache", "its weights may be another process's memory"),
        ("speculative_config", SimpleNamespace(enable_adaptive_verification=True), "adaptive verification"),
        ("kv_transfer_config", connector("NixlConnector"), "NixlConnector may register or read all"),
    ],
)
def test_what_is_not_served_is_left_as_it_is(path: str, value: object, why: str) -> None:
    made, before = with_other(path, value), with_other(path, value)
    with pytest.raises(Unsupported, match=why):
        plugin.choose_classes(made)
    assert made == before


@pytest.mark.parametrize("asynchronous", [False, True])
def test_several_ranks_get_our_executor_too(asynchronous: bool) -> None:
    made = ranks(asynchronous=asynchronous)
    plugin.choose_classes(made)
    assert chosen(made) == (plugin.WORKERS[GPU], SCHEDULERS[asynchronous], EXECUTOR)


@pytest.mark.parametrize("backend", ["ray", "external_launcher", "uni", None])
def test_ranks_that_others_start_are_left_alone(backend: str | None) -> None:
    made = ranks()
    made.parallel_config.distributed_executor_backend = backend
    with pytest.raises(Unsupported, match=f"started by {backend}"):
        plugin.choose_classes(made)
    assert chosen(made) == (GPU, None, backend)


def test_ranks_may_sleep_too() -> None:
    made = ranks()
    made.model_config = sleeping()
    plugin.choose_classes(made)
    assert chosen(made) == (plugin.WORKERS[GPU], SCHEDULERS[0], EXECUTOR)


def test_a_pipeline_is_served() -> None:
    made = ranks()
    made.parallel_config.pipeline_parallel_size = 2
    plugin.choose_classes(made)
    assert chosen(made) == (plugin.WORKERS[GPU], SCHEDULERS[0], EXECUTOR)


@pytest.mark.parametrize("model", [sleeping(), sleeping(sleep_mode_offload_cudagraph=False)])
def test_sleep_mode_is_served(model: Any) -> None:
    made = with_other("model_config", model)
    plugin.choose_classes(made)
    assert chosen(made) == (plugin.WORKERS[CPU], SCHEDULERS[0], "uni")


@pytest.mark.parametrize("name", [*sorted(connectors.SERVED), None])
def test_connectors_whose_copies_are_known_are_served(name: str | None) -> None:
    made = with_other("kv_transfer_config", connector(name))
    plugin.choose_classes(made)
    assert chosen(made) == (plugin.WORKERS[CPU], SCHEDULERS[0], "uni")


def test_one_that_copies_what_nobody_holds_is_not_served_in_sleep_mode() -> None:
    made = with_other("kv_transfer_config", connector("OffloadingConnector"))
    made.model_config = sleeping()
    with pytest.raises(Unsupported, match="falls asleep"):
        plugin.choose_classes(made)


@pytest.mark.parametrize(
    ("value", "said"), [(None, ""), ("0", ""), ("", ""), ("true", "TEM_ENABLE is 'true', not 1")]
)
def test_nothing_happens_unless_it_is_asked_for_and_who_asks_otherwise_is_told(
    monkeypatch: pytest.MonkeyPatch,
    engine_args: list[Any],
    warnings: list[str],
    value: str | None,
    said: str,
) -> None:
    if value is None:
        monkeypatch.delenv("TEM_ENABLE")
    else:
        monkeypatch.setenv("TEM_ENABLE", value)
    plain = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is plain
    assert [said in each for each in warnings] == ([True] if said else [])


def test_a_variable_that_is_misspelt_is_told(
    monkeypatch: pytest.MonkeyPatch, engine_args: list[Any], warnings: list[str]
) -> None:
    monkeypatch.setenv("TEM_PRIORTY", "idle")
    plugin.register()
    engine_args.append(config())
    created()
    assert warnings == ["torch_elastic_mem: TEM_PRIORTY means nothing here; did you mean TEM_PRIORITY?"]


def test_an_engine_whose_class_is_empty_serves() -> None:
    assert variables.account({"TEM_PRIORITY": ""}).priority == "serving"
    assert variables.account({"TEM_PRIORITY": "idle"}).priority == "idle"


def test_an_engine_that_is_configured_afterwards_is_elastic(
    engine_args: list[Any], warnings: list[str]
) -> None:
    plugin.register()
    engine_args.append(config(asynchronous=True))
    assert chosen(created()) == (plugin.WORKERS[CPU], SCHEDULERS[1], "uni")
    assert warnings == []


def test_an_engine_that_is_not_served_is_configured_as_ever_and_a_warning_says_why(
    engine_args: list[Any], warnings: list[str]
) -> None:
    plugin.register()
    engine_args.append(with_other("model_config.runner_type", "pooling"))
    assert created() == with_other("model_config.runner_type", "pooling")
    assert len(warnings) == 1 and "pooling" in warnings[0]


def test_a_configuration_without_what_is_looked_for_is_left_alone(
    engine_args: list[Any], warnings: list[str]
) -> None:
    plugin.register()
    made = config()
    del made.kv_transfer_config
    engine_args.append(made)
    assert created().parallel_config.worker_cls == CPU
    assert len(warnings) == 1 and "kv_transfer_config" in warnings[0]


def test_what_vllm_says_of_a_configuration_is_not_hidden(engine_args: list[Any]) -> None:
    plugin.register()
    with pytest.raises(IndexError):
        created()


def test_an_unknown_release_is_left_alone_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, engine_args: list[Any], warnings: list[str]
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.1")
    plain = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is plain
    assert len(warnings) == 1 and "vLLM 0.99 is not among those that are known" in warnings[0]


def test_an_error_while_looking_is_a_warning_and_not_the_end_of_vllm(
    monkeypatch: pytest.MonkeyPatch, engine_args: list[Any], warnings: list[str]
) -> None:
    def broken(name: str) -> str:
        raise RuntimeError("a broken installation")

    monkeypatch.setattr(importlib.metadata, "version", broken)
    plugin.register()
    assert len(warnings) == 1 and "a broken installation" in warnings[0]


def test_registering_twice_wraps_once(engine_args: list[Any]) -> None:
    plugin.register()
    wrapped = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is wrapped


@pytest.mark.parametrize("path", [*plugin.WORKERS, *plugin.WORKERS.values(), *SCHEDULERS, EXECUTOR])
def test_every_class_that_is_named_is_there(path: str) -> None:
    module, name = path.rsplit(".", 1)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, OSError) as missing:
        if "gpu_worker" not in path:
            raise
        pytest.skip(f"no CUDA here: {missing}")
    assert isinstance(found, type)


@pytest.mark.parametrize("path", SCHEDULERS)
def test_our_schedulers_stand_before_vllms_in_the_order_of_their_classes(path: str) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    module, name = path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, Scheduler)
    assert found.__mro__[1].__module__ == module
    assert found.__mro__[2].__module__.startswith("vllm.v1.core.sched.")


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (point,) = points["vllm.general_plugins"].values()
    module, name = point.split(":")
    assert getattr(importlib.import_module(module), name) is plugin.register


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TEM_PRIORITY", "urgent"),
        ("TEM_MAX", "a lot"),
        ("TEM_WEIGHT", "heavy"),
        ("TEM_DEVICE", "tpu:0"),
    ],
)
def test_a_wrong_variable_is_an_error_of_the_engines_configuration_that_names_it(
    monkeypatch: pytest.MonkeyPatch, engine_args: list[Any], variable: str, value: str
) -> None:
    plugin.register()
    monkeypatch.setenv(variable, value)
    engine_args.append(config())
    with pytest.raises(InvalidArgument, match=variable):
        created()


def test_a_broker_that_is_named_and_does_not_answer_is_an_error_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, engine_args: list[Any], tmp_path: Path
) -> None:
    plugin.register()
    monkeypatch.setenv("TEM_BROKER", str(tmp_path / "nobody.sock"))
    engine_args.append(config())
    with pytest.raises(BrokerError, match=r"TEM_BROKER: no broker listens at .*nobody\.sock"):
        created()


def test_a_broker_that_is_named_and_answers_is_no_error(
    monkeypatch: pytest.MonkeyPatch, engine_args: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    service = Service(tmp_path_factory.mktemp("b")).start()
    try:
        plugin.register()
        monkeypatch.setenv("TEM_BROKER", str(service.path))
        engine_args.append(config())
        assert chosen(created())[0] == plugin.WORKERS[CPU]
    finally:
        service.close()


def test_what_the_variables_say_of_an_engine_that_is_not_served_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, engine_args: list[Any], warnings: list[str]
) -> None:
    plugin.register()
    monkeypatch.setenv("TEM_MAX", "a lot")
    engine_args.append(with_other("model_config.runner_type", "pooling"))
    created()
    assert len(warnings) == 1 and "pooling" in warnings[0]
