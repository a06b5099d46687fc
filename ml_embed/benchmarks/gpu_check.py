"""The GPU check: sections that find out what a CPU cannot tell of the GPU path, one JSON each."""

import inspect
import json
import traceback
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from ml_embed.benchmarks import common
from ml_embed.benchmarks.gpu_common import GIB, Setting, free_memory
from ml_embed.benchmarks.gpu_encoding import encoding, trainer
from ml_embed.benchmarks.gpu_kernels import grouped_heads, kernels, losses, peaks
from ml_embed.benchmarks.gpu_training import (
    collectives,
    optimizer,
    precision,
    training,
    variants,
)
from ml_embed.errors import UserError

MORE_LIBRARIES = ("accelerate", "peft", "datasets", "flash-attn", "triton")


def environment(setting: Setting) -> dict[str, Any]:
    """Versions of libraries, and what the GPU is. `varlen_attn` should take `enable_gqa`."""
    found = common.environment(setting.device.type)
    found["versions"] |= {name: common.version(name) for name in MORE_LIBRARIES}
    found["varlen_attn"] = str(inspect.signature(varlen_attn))[:300]
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        found |= {"sm": properties.multi_processor_count, "GiB": properties.total_memory / GIB}
        found["nccl"] = torch.cuda.nccl.version()
    return found


Section = Callable[[Setting], dict[str, Any]]
_IN_ORDER: tuple[Section, ...] = (
    environment,
    peaks,
    kernels,
    grouped_heads,
    precision,
    variants,
    optimizer,
    training,
    losses,
    encoding,
    trainer,
    collectives,
)
SECTIONS = {section.__name__: section for section in _IN_ORDER}
"""by name, the most important first"""


BENCHMARK = ("kernels", "precision", "training")
"""the sections of `report_benchmark`"""


def run_sections(setting: Setting, names: Sequence[str], deadline: float) -> dict[str, Any]:
    """Run sections in order; print what each finds, and append it to check_gpu.jsonl.

    A section that fails says so, and the next one runs.

    Args:
        setting: where, and how large.
        names: sections to run; none for all of them.
        deadline: seconds after which no further section begins.
    Returns:
        section -> what it found.
    """
    begin, all_found = perf_counter(), {}
    for name, section in SECTIONS.items():
        if names and name not in names:
            continue
        start = perf_counter()
        if start - begin > deadline:
            print(f"SKIPPED {name}: deadline")
            continue
        try:
            found = section(setting)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            found = {"FAILED": f"{type(error).__name__}: {error}"[:800]}
        seconds = round(perf_counter() - start, 1)
        line = json.dumps({"section": name, "seconds": seconds, "result": found}, default=str)
        print(line, flush=True)
        with (setting.output / "check_gpu.jsonl").open("a") as file:
            file.write(line + "\n")
        free_memory(setting.device)
        all_found[name] = found
    return all_found


def report_benchmark(setting: Setting) -> None:
    """Check kernels and gradients, measure the training step, and print the JSON line.

    Raises:
        UserError: something failed or is not right; what it says of speed is then worth nothing.
    """
    found = run_sections(setting, BENCHMARK, deadline=3600)
    common.print_result("gpu", found, device=setting.device.type)
    wrong = [name for name, own in found.items() if "FAILED" in own or own.get("ok") is False]
    if wrong:
        raise UserError(f"not right: {', '.join(wrong)}; see what they printed")
