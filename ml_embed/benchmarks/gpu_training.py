"""Sections of the GPU check that train: gradients, speed, memory, collectives.

Losses and gradients are compared as relative errors of whole tensors, |a - b| / |b|.
"""

import json
import os
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ml_embed.benchmarks.common import matrix_peak
from ml_embed.benchmarks.gpu_common import (
    SMALL,
    SMALL_MODEL,
    Setting,
    free_memory,
    measure_step,
    random_batch,
    relative_error,
    share_of_data_sheet,
    wait,
)
from ml_embed.benchmarks.samples import make_backbone
from ml_embed.benchmarks.training_setup import (
    Contender,
    accumulate_gradients,
    fast_contender,
    matryoshka_spec,
    naive_contender,
    plain_names,
)
from ml_embed.data.batch import ContrastiveBatch
from ml_embed.distributed import collectives as own_collectives
from ml_embed.distributed.engine import AccelerateEngine
from ml_embed.kernels.attention import choose_kernel
from ml_embed.losses.objective import Objective
from ml_embed.model import MatryoshkaEncoder, default_exits, factorize_table

FLOAT32_TOLERANCE = 1e-4
HALF_ERRORS_ALLOWED = 1.5
"""how many times the naive bfloat16 gradient's error ours may have"""


def precision(setting: Setting) -> dict[str, Any]:
    """Loss and gradients of our step and of the naive one, in float32 and bfloat16.

    All are compared with the naive step in float32. A good answer is "ok": ours is the same in
    float32, and in bfloat16 about as near as the naive step.
    """
    batch = random_batch(SMALL, SMALL_MODEL)
    loss, exact = naive_contender(batch, SMALL, setting.accelerator("no"), SMALL_MODEL).gradients()
    result: dict[str, Any] = {"loss_fp32": loss}
    for name, make, mode in (
        ("fast_fp32", fast_contender, "no"),
        ("naive_bf16", naive_contender, "bf16"),
        ("fast_bf16", fast_contender, "bf16"),
    ):
        loss, found = make(batch, SMALL, setting.accelerator(mode), SMALL_MODEL).gradients()
        found = plain_names(found)
        each = {weight: relative_error(found[weight], grad) for weight, grad in exact.items()}
        result[name] = {
            "loss": loss,
            "gradient": relative_error(_flat(found[w] for w in exact), _flat(exact.values())),
            "worst": max(each.items(), key=lambda item: item[1]),
        }
    errors = {name: result[name]["gradient"] for name in ("fast_fp32", "fast_bf16", "naive_bf16")}
    result["ok"] = (
        errors["fast_fp32"] < FLOAT32_TOLERANCE
        and errors["fast_bf16"] < HALF_ERRORS_ALLOWED * errors["naive_bf16"]
    )
    return result


def _flat(tensors: Iterable[Any]) -> Tensor:
    """The numbers of all tensors, one after another."""
    return torch.cat([tensor.flatten() for tensor in tensors])


@dataclass(frozen=True)
class Variant:
    """A way to compute the same gradients."""

    max_tokens: int = 0
    """tokens of a GradCache chunk; 0 = the whole batch at once"""
    gradient_checkpointing: bool = False
    compile_layers: bool = False


VARIANTS = {
    "whole": Variant(),
    "chunks": Variant(max_tokens=700),
    "checkpointing": Variant(gradient_checkpointing=True),
    "compiled": Variant(compile_layers=True),
    "compiled_chunks": Variant(max_tokens=700, compile_layers=True),
}
VARIANT_ROWS = (6, 5, 7, 6, 4, 8, 3, 9, 10, 2)
"""of the batches that each variant runs"""
VARIANT_LAYERS, VARIANT_RANK = 12, 32
MARGIN = 0.05
"""false_negative_margin, so that its masks run, too"""


def variants(setting: Setting) -> dict[str, Any]:
    """Chunks, checkpointing, compiled layers: the same gradients, and no waiting for the device.

    A good answer: `gradient_from_whole` as small as bfloat16 allows, `same_to_the_bit_again` true,
    and an empty list of `waits`, the places in the code where the CPU waited for the GPU. A variant
    that fails, or compiles again for a batch of another size, is told in words.
    """
    batches = [
        random_batch(replace(SMALL, batch_size=rows), SMALL_MODEL, seed=seed)
        for seed, rows in enumerate(VARIANT_ROWS)
    ]
    accelerator = setting.accelerator()
    result: dict[str, Any] = {}
    whole = None
    for name, variant in VARIANTS.items():
        try:
            result[name], gradient = _measure_variant(
                setting, _make_run(setting, accelerator, variant), batches, whole
            )
            whole = gradient if whole is None else whole
        except Exception as error:
            result[name] = f"{type(error).__name__}: {error}"[:600]
        accelerator.free_memory()  # it keeps what it prepared
        free_memory(setting.device)
    return result


@dataclass(frozen=True)
class _VariantRun:
    """A model that computes gradients in one of the ways."""

    variant: Variant
    encoder: MatryoshkaEncoder
    engine: AccelerateEngine
    device: torch.device

    def backward(self, batch: ContrastiveBatch) -> None:
        """Compute the gradients of a batch."""
        self.encoder.zero_grad()
        objective = Objective(matryoshka_spec(SMALL.hidden), false_negative_margin=MARGIN)
        moved, max_tokens = batch.to(self.device), self.variant.max_tokens
        accumulate_gradients(self.engine, moved, objective, max_tokens, rank=VARIANT_RANK)

    def gradient(self) -> Tensor:
        """All gradients that were computed last, one after another."""
        return _flat(parameter.grad for parameter in self.encoder.parameters())


def _make_run(setting: Setting, accelerator: Accelerator, variant: Variant) -> _VariantRun:
    layers = VARIANT_LAYERS
    backbone = make_backbone(
        None, num_hidden_layers=layers, hidden_size=SMALL.hidden, **SMALL_MODEL
    )
    encoder = MatryoshkaEncoder(
        backbone,
        default_exits(layers),
        factorize_table(backbone.embed_tokens.weight.detach(), SMALL.rank),
        kernel=choose_kernel(
            "auto", setting.device, torch.bfloat16 if setting.on_gpu else torch.float32
        ),
        gradient_checkpointing=variant.gradient_checkpointing,
        compile_layers=variant.compile_layers,
    )
    unused = torch.optim.SGD(encoder.parameters())
    engine = AccelerateEngine(accelerator, encoder, unused)
    return _VariantRun(variant, encoder, engine, accelerator.device)


def _measure_variant(
    setting: Setting, run: _VariantRun, batches: list[ContrastiveBatch], whole: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """What is told of a variant, and its gradient of the first batch.

    `whole` is the gradient that it should have; None for the first variant, which defines it.
    """
    start = perf_counter()
    run.backward(batches[0])
    wait(setting.device)
    seconds = perf_counter() - start
    gradient = run.gradient()
    run.backward(batches[0])
    entry: dict[str, Any] = {
        "first_s": seconds,
        "gradient_from_whole": relative_error(gradient, gradient if whole is None else whole),
        "same_to_the_bit_again": bool(torch.equal(gradient, run.gradient())),
    }
    for batch in batches[1:4]:
        run.backward(batch)
    if setting.on_gpu:
        entry["waits"] = _waits(run, batches[4:])
    return entry, gradient


def _waits(run: _VariantRun, batches: list[ContrastiveBatch]) -> list[str]:
    """Files and lines at which the CPU waits for the GPU; compiling again is an error."""
    compiled = run.variant.compile_layers
    recompiling = torch._dynamo.config.patch(error_on_recompile=True) if compiled else nullcontext()
    with recompiling, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for batch in batches:
                run.backward(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = (warning for warning in caught if "synchroniz" in str(warning.message))
    return sorted({f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits})


def optimizer(setting: Setting) -> dict[str, float]:
    """Five steps of fused AdamW against torch's plain loop over parameters.

    A good answer is a relative error of the weights near float32's precision, 1e-7.
    """

    def weights(**kind: bool) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 64)).to(setting.device)
        adam = torch.optim.AdamW(net.parameters(), 1e-3, (0.9, 0.98), 1e-8, 1e-2, **kind)
        for step in range(5):
            adam.zero_grad()
            x = torch.randn(32, 256, generator=torch.Generator().manual_seed(step))
            net(x.to(setting.device)).square().sum().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            adam.step()
        return _flat(net.parameters())

    fused, loop = weights(fused=True), weights(foreach=False, fused=False)
    return {"fused_from_loop": relative_error(fused, loop)}


TRAINING_RUNS = (
    ("fast", 3),
    ("naive", 3),
    ("fast", 4),
    ("compiled", 4),
    ("compiled", 8),
    ("fast", 8),
)
"""(version, rows of the batch), most important first; the naive step of 4 rows needs 84
GiB by an estimate"""
SMALL_RUNS = 2
"""of them in a rehearsal"""
PROFILED = ("fast_4", "compiled_4")
BATCHES = 3
"""of other lengths, which take turns"""


def training(setting: Setting) -> dict[str, Any]:
    """Speed and memory of training Qwen3-0.6B's shape: the naive step, ours, ours compiled.

    Prints what each version gave as one JSON object. MFU is the share of the data sheet's peak, and
    of what large square products reach here. A good answer, by estimates:
    `ratio` (speed of "fast_3" in
    "naive_3") at least 2.5, `memory_share` at most 0.6, `mfu` of "compiled_8" at least .45, and
    `kernel_ms_a_step` of the profiles near `wall_ms_profiled`: the GPU is never idle. Profiles are
    written to the output folder.
    """
    size = 256 if setting.small else 8192
    peak = matrix_peak(size, 10, setting.device, setting.dtype)
    result: dict[str, Any] = {"measured_peak_tflops": peak / 1e12}
    for version, rows in TRAINING_RUNS[: SMALL_RUNS if setting.small else None]:
        key = f"{version}_{rows}"
        try:
            result[key] = _measure_version(setting, version, rows, peak)
        except torch.OutOfMemoryError:
            result[key] = "out of memory"
        except Exception as error:
            result[key] = f"{type(error).__name__}: {error}"[:500]
        free_memory(setting.device)
        print(json.dumps({key: result[key]}), flush=True)
    fast, naive = result["fast_3"], result["naive_3"]
    if isinstance(fast, dict) and isinstance(naive, dict):
        result["ratio"] = fast["tokens_per_s"] / naive["tokens_per_s"]
        result["memory_share"] = fast["peak_GiB"] / naive["peak_GiB"] if setting.on_gpu else None
    return result


def _measure_version(setting: Setting, version: str, rows: int, peak: float) -> dict[str, Any]:
    shape, model = setting.shape(rows)
    batch, *others = (random_batch(shape, model, seed=seed) for seed in range(BATCHES))
    accelerator = setting.accelerator()
    if version == "naive":
        contender = naive_contender(batch, shape, accelerator, model, others=others)
    else:
        compiled = version == "compiled"
        contender = fast_contender(
            batch, shape, accelerator, model, compiled=compiled, others=others
        )
    tokens = sum(each.num_tokens for each in (batch, *others)) / BATCHES
    try:
        # each batch once before the clock runs: compiling, allocating
        measured = measure_step(contender, tokens, 3 * BATCHES, setting.device, warm_up=BATCHES)
        found: dict[str, Any] = {
            "ms": measured.timing.median * 1e3,
            "tokens_per_s": measured.tokens_per_second,
            "mfu": share_of_data_sheet(setting.device, measured.flops_per_second),
            "mfu_of_measured_peak": measured.flops_per_second / peak,
            "tflops": measured.flops_per_second / 1e12,
            "peak_GiB": measured.peak_mib / 1024,
            "first_s": measured.first_seconds,
            "tokens": tokens,
        }
        key = f"{version}_{rows}"
        if key in PROFILED and setting.on_gpu:
            found["profile"] = _profile(contender, setting.output / f"profile_{key}.txt")
        return found
    finally:
        accelerator.free_memory()  # it keeps what it prepared


def _profile(contender: Contender, path: Path) -> dict[str, float]:
    """Kernels per step, and their time against the wall's; a table of all is written to `path`."""
    from torch.profiler import ProfilerActivity, profile

    steps = 2
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(steps):
            contender.step()
        torch.cuda.synchronize()
        wall = perf_counter() - start
    averages = trace.key_averages()
    path.write_text(
        averages.table(sort_by="self_device_time_total", row_limit=60)
        + averages.table(sort_by="self_cpu_time_total", row_limit=30)
    )
    events = trace.events() or []
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "kernels_a_step": len(kernels) / steps,
        "kernel_ms_a_step": sum(e.self_device_time_total for e in kernels) / steps / 1e3,
        "wall_ms_profiled": wall / steps * 1e3,
    }


def collectives(setting: Setting) -> dict[str, Any]:
    """This project's collectives over NCCL, usually with one process.

    RANK, WORLD_SIZE, MASTER_PORT and CHECK_BACKEND are taken from the environment. A good answer:
    `gather` and `gradient` true, `sum64` W and `uneven` 1 + ... + W for W processes, `first` "x".
    """
    defaults = {"MASTER_PORT": "29555", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    backend = os.environ.get("CHECK_BACKEND", "nccl" if setting.on_gpu else "gloo")
    dist.init_process_group(backend)
    try:
        return {"backend": backend, "world": dist.get_world_size()} | _run_collectives(setting)
    finally:
        dist.destroy_process_group()


def _run_collectives(setting: Setting) -> dict[str, Any]:
    device, world, rank = setting.device, dist.get_world_size(), dist.get_rank()

    def rows_of(process: int) -> Tensor:
        """(3, 2, 4), not contiguous: as the objective gathers its passages."""
        return (torch.arange(24.0, device=device).view(2, 3, 4) + 100 * process).transpose(0, 1)

    rows = rows_of(rank).requires_grad_()
    gathered = own_collectives._GatherRows.apply(rows)
    (gathered * torch.arange(len(gathered), device=device).view(-1, 1, 1)).sum().backward()
    assert rows.grad is not None
    expected = world * (3 * rank + torch.arange(3.0, device=device))
    ones = torch.ones(2, dtype=torch.float64, device=device)
    return {
        "gather": torch.equal(gathered, torch.cat([rows_of(process) for process in range(world)])),
        "gradient": torch.equal(rows.grad[:, 0, 0], expected),
        "sum64": float(own_collectives.all_reduce_sum(ones)[0]),
        "uneven": len(own_collectives.gather_uneven(torch.ones(rank + 1, 2, device=device))),
        "first": own_collectives.compute_on_main_process(lambda: "x"),
    }
