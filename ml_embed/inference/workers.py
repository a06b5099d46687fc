"""Work under way beside the caller: one step ahead in a thread, or in processes of their own.

Letters: n texts of a window, D vector length.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

Encode = Callable[[list[str]], np.ndarray]
"""n texts -> (n, D) vectors"""
Load = Callable[[str], Encode]
"""device -> a model on it; it is pickled, so that another process can call it"""


def results_in_order(items: Iterable, submit: Callable[[Any], Future], ahead: int) -> Iterator[Any]:
    """Results of `submit(item)` in order, with up to `ahead` further items under way."""
    running: deque[Future] = deque()
    for item in items:
        running.append(submit(item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def encode_in_processes(
    load: Load, devices: list[str], windows: Iterable[list[str]]
) -> Generator[np.ndarray, None, None]:
    """Vectors of one window after another, computed by a process and a model per device."""
    # Spawned, not forked: a forked process cannot use CUDA.
    context = get_context("spawn")
    waiting = context.SimpleQueue()
    for device in devices:
        waiting.put(device)
    with ProcessPoolExecutor(
        len(devices), context, _start_worker, (load, waiting, len(devices))
    ) as pool:
        yield from results_in_order(
            windows, lambda texts: pool.submit(_encode_in_worker, texts), 2 * len(devices)
        )


_in_worker: dict[str, Encode] = {}


def _start_worker(load: Load, devices: Any, workers: int) -> None:
    device = devices.get()
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _in_worker["encode"] = load(device)


def _encode_in_worker(texts: list[str]) -> np.ndarray:
    return _in_worker["encode"](texts)
