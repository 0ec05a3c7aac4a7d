"""What one process needs to know about the others; with a single process everything here is a no-op."""

import gc
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metric_kd.errors import UserError
from metric_kd.generators import restore, seed_all, states_of

PATIENCE = "METRIC_KD_TIMEOUT"
"""Environment variable: minutes for which a process waits for the others."""


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def announced() -> int:
    """How many processes ``torchrun`` has started for this run, whether or not they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and prints results; known before the processes meet."""
    if announced() > 1 and world_size() == 1:
        return os.environ.get("RANK", "0") == "0"
    return rank() == 0


def start(device: torch.device) -> None:
    """Join the group that ``torchrun`` announced in the environment: NCCL on CUDA, gloo elsewhere."""
    if announced() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(local_rank())
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience())


def patience() -> timedelta:
    """How long a process waits for the others before it gives up: 30 minutes, or what METRIC_KD_TIMEOUT says.

    That is for processes that hang, and longer than the main one searches neighbours while the others wait; of a process
    that dies the others hear at once, from gloo or from torchrun. Raises ``UserError`` for what is no positive number.
    """
    text = os.environ.get(PATIENCE, "30")
    try:
        limit = timedelta(minutes=float(text))
    except (ValueError, OverflowError):
        limit = timedelta(0)
    if limit <= timedelta(0):
        raise UserError(f"{PATIENCE} is {text!r}; give minutes, as in {PATIENCE}=30.")
    return limit


def lost(error: BaseException) -> str | None:
    """What to tell the user where an error says that another process died, hung or could not be found; else None."""
    if announced() == 1 and world_size() == 1:
        return None
    text = str(error)
    if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and _OF_THE_GROUP.search(text)):
        return None
    first = re.split(r"\n|\. ", text.strip())[0]  # what follows is advice to programmers
    reason = re.sub(r"\[[^]]*\.\w+:\d+\] *", "", first).rstrip(".")  # without the place in gloo's code
    return (
        f"another process of this run died or did not answer in time ({reason}); see what it said, and start the same "
        "command again, which goes on from the last checkpoint."
    )


_OF_THE_GROUP = re.compile("gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out waiting", re.IGNORECASE)
"""gloo raises plain errors: they are known by their words."""


def stop() -> None:
    """Leave the group, and let its threads end: one that still drops tensors while Python ends would abort the process."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # DDP lies in cycles, and the group lives as long as any of them holds it
        dist.destroy_process_group()


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return any(gather_objects(flag))


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class _AllGather(torch.autograd.Function):
    """The rows of all processes; see :func:`all_gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        whole = x.new_empty(world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous())
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        first = rank() * ctx.rows
        return grads[0][first : first + ctx.rows] * world_size()


def all_gather(x: Tensor) -> Tensor:
    """(N, ...) of every process, by rank, to (P N, ...) on all; N is the same everywhere. Carries the gradient.

    For losses L that every process computes in full from the gathered rows X. Then each knows dL/dX, and what flows back
    is P dL/dX of its own rows, without a second exchange. Averaged over the processes, as DistributedDataParallel does,
    1/P sum_r (dX_r/dw)^T P dL/dX_r = dL/dw: what one process would compute from the whole batch. Parameters that are
    applied after the gathering get dL/dw on each, and so on the average.
    """
    return x if world_size() == 1 else _AllGather.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def gather_rows(x: Tensor, device: torch.device) -> Tensor | None:
    """(N_r, ...) rows of every process r, some perhaps none, to all of them by rank on the main one; None on the others.

    x: on the CPU, as the result is; ``device`` is what the group sends from. One process after the other, so that the main
    one never holds more than the result and one share.
    """
    if world_size() == 1:
        return x
    described = gather_objects((tuple(x.shape), x.dtype))
    if not is_main():
        if len(x):
            dist.send(x.contiguous().to(device), dst=0)
        return None
    parts = []
    for sender, (shape, dtype) in enumerate(described):
        if sender == 0:
            part = x
        elif shape[0]:
            part = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(part, src=sender)
        else:
            continue
        if len(part):
            parts.append(part.cpu())
    return torch.cat(parts) if parts else x


def average(x: Tensor) -> Tensor:
    """The mean over all processes."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of the main process."""
    if world_size() > 1:
        for tensor in tensors:
            sent = tensor.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(sent, src=0)
            tensor.detach().copy_(sent)


class _Common:
    """The stream of random numbers that all processes have in common: where it starts, and where it stands."""

    seed: int | None = None
    states: tuple[Any, ...] | None = None


def seed_common(seed: int) -> None:
    """Begin the stream of :func:`common_draws` anew; the same number on every process."""
    _Common.seed, _Common.states = seed, None


@contextmanager
def common_draws(device: torch.device) -> Iterator[None]:
    """What is drawn inside is the same on every process, and goes on where the last such context ended.

    Afterwards each process draws on as if nothing had been drawn. Without :func:`seed_common` the main process begins the
    stream. With a single process nothing happens: its own stream is the common one.
    """
    if world_size() == 1:
        yield
        return
    own = states_of(device)
    if _Common.states is not None:
        restore(_Common.states, device)
    else:
        seed = from_main(int(torch.randint(2**62, ()))) if _Common.seed is None else _Common.seed
        seed_all(seed)
    try:
        yield
        _Common.states = states_of(device)
    finally:
        restore(own, device)
