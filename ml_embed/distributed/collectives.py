"""Collectives that the losses need, on one process as on many.

Letters: W processes, R rows of each process.
"""

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ml_embed.errors import UserError, message_for_user

Result = TypeVar("Result")
# torch 2.13 renamed them and warns of the old names.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process ended or did not answer."""
    text = str(error).lower()
    signs = (
        "closed by peer",
        "reset by peer",
        "broken pipe",
        "timed out",
        "timeout",
        "connectfullmesh failed",
    )
    return isinstance(error, dist.DistError) or (
        "gloo" in text and any(sign in text for sign in signs)
    )


def choose_gloo_interface() -> None:
    """Let gloo use the network that leads to the first machine.

    By itself it takes what the host's name resolves to, which on many machines is the loopback.
    """
    if "MASTER_ADDR" not in os.environ or os.environ.get("WORLD_SIZE") == os.environ.get(
        "LOCAL_WORLD_SIZE"
    ):
        return
    first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, address = socket.getaddrinfo(*first, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward sums every process's gradient and hands each its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.shape = rows.shape
        return _gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(ctx.shape)
        _REDUCE_SCATTER(own, gradient.contiguous())
        return own


def _gather(rows: Tensor) -> Tensor:
    """(R, ...) of each process -> (W R, ...) in process order, in one piece of memory."""
    gathered = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
    _ALL_GATHER(gathered, rows.contiguous())
    return gathered


def gather_rows(rows: Tensor) -> Tensor:
    """(R, ...) of each process -> (W R, ...) in process order, with gradients to the rows' owners.

    A plain gather is not differentiable: the passages would not learn from other processes'
    queries. R must be the same on all processes.
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum of `values` over processes, without gradients; `values` itself is left as it is."""
    if world_size() == 1:
        return values
    summed = values.detach().clone()
    dist.all_reduce(summed)
    return summed


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest `value` of all processes."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_uneven(rows: Tensor) -> Tensor:
    """All processes' rows (R_p, ...) in process order, without gradients; R_p may differ."""
    if world_size() == 1:
        return rows
    longest = all_reduce_max(len(rows), rows.device)
    counts = _gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    blocks = _gather(padded).view(world_size(), longest, *rows.shape[1:])
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def compute_on_main_process(compute: Callable[[], Result]) -> Result:
    """Call `compute` on the first process; its result, or its error, reaches all processes.

    Raises:
        UserError: `compute` raised it, or met an error of a disk; on all processes alike.
    """
    outcome: list[Any] = [None, None]  # the result, and an error's message
    error: Exception | None = None
    if process_index() == 0:
        try:
            outcome[0] = compute()
        except Exception as raised:
            if (message := message_for_user(raised)) is None:
                raise
            error, outcome[1] = raised, message
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def compute_on_all_processes(compute: Callable[[], Result]) -> Result:
    """Call `compute` on each process; where it is a UserError on one, it is one on all of them.

    So is an error of a disk. No process ends before all have come here: one that is still on its
    way would take the end of another for the reason to end. Each raises its own error; those
    without, the first process's that has one.
    """
    result, error, message = None, None, None
    try:
        result = compute()
    except Exception as raised:
        if (message := message_for_user(raised)) is None:
            raise
        error = raised
    messages = gather_objects(message)
    if error is not None:
        raise error
    for process, other in enumerate(messages):
        if other is not None:
            raise UserError(f"process {process} of this run cannot go on: {other}")
    return cast("Result", result)


def gather_objects(value: Any) -> list[Any]:
    """`value` of each process, in their order."""
    gathered = [value] * world_size()
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value)
    return gathered
