"""Training runs whose every bit must be the same whichever allocator torch has.

`python -m tests.alloc.real_models MODE` runs each workload and prints a line of JSON for it: the
losses and a digest of what was trained. MODE is "native", or "ours": on an account, or "pressed": while an
account of a higher class takes and gives back, from other threads, memory that training has.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Read when the libraries are loaded.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["NCCL_SOCKET_IFNAME"] = "lo"

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import torch_elastic_mem as tem
from tests.alloc.rival import CAPACITY, Rival

Losses = list[torch.Tensor]
Result = tuple[Losses, list[torch.Tensor]]
Workload = Callable[[], Result]
WORKLOADS: dict[str, Workload] = {}
UNDER_PRESSURE: list[str] = []


def workload(function: Workload) -> Workload:
    WORKLOADS[function.__name__] = function
    return function


def pressed(function: Workload) -> Workload:
    """Of the workloads that run under pressure as well."""
    UNDER_PRESSURE.append(function.__name__)
    return function


class Missing(Exception):
    """A library that is not installed."""


def need(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise Missing(name)


def seed(number: int = 0) -> None:
    torch.manual_seed(number)


def mlp(width: int = 256, depth: int = 4, dropout: float = 0.1) -> torch.nn.Sequential:
    layers = (
        torch.nn.Sequential(torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Dropout(dropout))
        .append(torch.nn.Linear(2 * width, width))
        .append(torch.nn.LayerNorm(width))
        for _ in range(depth)
    )
    return torch.nn.Sequential(*layers)


def train(
    model: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], batches: Iterator[torch.Tensor]
) -> Result:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = forward(batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, list(model.parameters())


def noise(steps: int, *shape: int) -> Iterator[torch.Tensor]:
    for step in range(steps):
        # Sizes that change, as those of text do, leave holes.
        yield torch.randn(shape[0] - step % 3, *shape[1:], device="cuda")


@workload
@pressed
def a_resnet() -> Result:
    need("torchvision")
    from torchvision.models import resnet18

    model = resnet18(num_classes=10).cuda()
    return train(model, model, noise(6, 32, 3, 128, 128))


@workload
@pressed
def a_deep_resnet_in_half_precision() -> Result:
    need("torchvision")
    from torchvision.models import resnet50

    model = resnet50(num_classes=10).cuda()
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    losses = []
    for batch in noise(4, 16, 3, 96, 96):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model(batch).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return losses, list(model.parameters())


@workload
@pressed
def a_language_model_by_its_trainer() -> Result:
    need("transformers", "accelerate")
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    losses = []

    class Watched(Trainer):  # type: ignore[misc]
        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*arguments, **options)
            losses.append(loss.detach().clone())
            return loss

    seed()
    config = GPT2Config(
        vocab_size=1000, n_positions=128, n_embd=256, n_layer=4, n_head=4, attn_implementation="eager"
    )
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(0, 1000, (64, 128))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            report_to="none",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            max_steps=6,
            logging_steps=2,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=2,
            seed=0,
        )
        Watched(model=model, args=options, train_dataset=rows).train()
    return losses, list(model.parameters())


@workload
@pressed
def a_compiled_model_in_graphs() -> Result:
    model = mlp(dropout=0.0).cuda()
    compiled = torch.compile(model, mode="reduce-overhead")

    def forward(batch: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(batch)  # type: ignore[no-any-return]

    batches = (torch.randn(64, 256, device="cuda") for _ in range(8))
    losses, trained = train(model, lambda batch: forward(batch).clone(), batches)
    return [each.clone() for each in losses], trained


@workload
@pressed
def activations_that_are_computed_again() -> Result:
    model = mlp(512, 8).cuda()

    def forward(batch: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(model):
            batch = checkpoint(layer, batch.requires_grad_(), use_reentrant=index % 2 == 0)
        return batch

    return train(model, forward, noise(6, 2048, 512))


@workload
@pressed
def several_models_on_threads_and_streams() -> Result:
    models = []
    for number in range(4):
        seed(number)
        models.append((mlp(dropout=0.0).cuda(), [torch.randn(128, 256) for _ in range(10)]))
    torch.cuda.synchronize()
    results: dict[int, Result] = {}

    def work(number: int) -> None:
        model, batches = models[number]
        with torch.cuda.stream(torch.cuda.Stream()):
            results[number] = train(model, model, (batch.cuda() for batch in batches))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ordered = [results[number] for number in range(len(models))]
    return [loss for losses, _ in ordered for loss in losses], [
        each for _, trained in ordered for each in trained
    ]


@workload
def accelerate_with_accumulation() -> Result:
    need("accelerate")
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = mlp(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = DataLoader(Numbers(64), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, list(model.parameters())


class Numbers(Dataset[torch.Tensor]):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((256,), (index % 7) / 7)


def copied_ahead(loader: DataLoader[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Batches, each copied on a stream of its own while the one before is computed with."""
    ahead, main = torch.cuda.Stream(), torch.cuda.current_stream()

    def copied(batch: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(ahead):
            return batch.to("cuda", non_blocking=True)

    batches = iter(loader)
    following = copied(next(batches))
    for batch in batches:
        main.wait_stream(ahead)
        current, following = following, copied(batch)
        current.record_stream(main)
        yield current
    main.wait_stream(ahead)
    following.record_stream(main)
    yield following


@workload
def batches_of_workers_in_pinned_memory() -> Result:
    losses: Losses = []
    model = mlp().cuda()
    for context, workers in (("fork", 2), ("spawn", 1)):
        loader = DataLoader(
            Numbers(64), 8, num_workers=workers, multiprocessing_context=context, pin_memory=True
        )
        losses += train(model, model, copied_ahead(loader))[0]
    return losses, list(model.parameters())


@contextmanager
def world_of_one() -> Iterator[None]:
    dist.init_process_group("nccl", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.cuda.synchronize()
        dist.destroy_process_group()


@workload
def data_in_parallel() -> Result:
    with world_of_one():
        model = mlp().cuda()
        parallel = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[0], bucket_cap_mb=1, gradient_as_bucket_view=True
        )
        losses, trained = train(model, parallel, noise(8, 512, 256))
        del parallel
        return [each.clone() for each in losses], [each.detach().clone() for each in trained]


@workload
def parameters_in_shards() -> Result:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with world_of_one():
        model = mlp(512, 6).cuda()
        mesh = init_device_mesh("cuda", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        losses, trained = train(model, model, noise(8, 1024, 512))
        whole = [each.full_tensor().detach().clone() for each in trained]  # type: ignore[attr-defined]
        return [each.clone() for each in losses], whole


@workload
def collectives_of_tensors_that_are_let_go_of_at_once() -> Result:
    with world_of_one():
        sums = []
        for step in range(40):
            sent = torch.randn(1 << 18, device="cuda") + step
            gathered = torch.empty_like(sent)
            work = [
                dist.all_reduce(sent, async_op=True),
                dist.all_gather_into_tensor(gathered, sent, async_op=True),
            ]
            for each in work:
                each.wait()
            sums.append((sent + gathered).mean())
            del sent, gathered, work
        return [each.clone() for each in sums], []


def digest(tensors: list[torch.Tensor]) -> str:
    made = hashlib.sha256()
    for each in tensors:
        made.update(each.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def result_of(name: str) -> dict[str, Any]:
    seed()
    try:
        losses, trained = WORKLOADS[name]()
        torch.cuda.synchronize()
        values = [float(each.item()) for each in losses]
        assert values and all(value == value for value in values), values
        return {"losses": [value.hex() for value in values], "trained": digest(trained)}
    except Missing as missing:
        return {"missing": str(missing)}
    except Exception:  # noqa: BLE001
        return {"failure": traceback.format_exc()}


def main() -> None:
    mode = sys.argv[1]
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Memory that nobody has written must not matter, so it is left as the allocator gives it.
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False
    arena = rival = None
    if mode != "native":
        arena = tem.Arena("cuda", capacity=CAPACITY)
        training = arena.account("training", priority="training")
        torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", training))
    if arena is not None and mode == "pressed":
        torch.cuda.init()
        rival = Rival(arena.account("serving", priority="serving"))
    for name in UNDER_PRESSURE if mode == "pressed" else WORKLOADS:
        if rival is not None:
            rival.must_take()
        started = time.monotonic()
        result = result_of(name)
        print(json.dumps({"workload": name, **result, "seconds": time.monotonic() - started}), flush=True)
    if arena is not None and rival is not None:
        rival.stop()
        yields = [each for each in arena.yields() if each.victim == "training"]
        said = {"bursts": rival.bursts, "refused": rival.refused, "yields": len(yields)}
        print(json.dumps({"workload": "rival", "failure": rival.failure, **said}), flush=True)


if __name__ == "__main__":
    main()
