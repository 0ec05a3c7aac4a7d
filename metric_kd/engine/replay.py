"""Steps over more images than fit: the losses see all of them at once, the networks a chunk at a time.

Gao, Zhang, Han, Callan: Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021, arXiv 2101.06983.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metric_kd.distributed import average, world_size
from metric_kd.engine.accumulation import Scale
from metric_kd.engine.gathering import detached
from metric_kd.engine.tasks import Solo, Task
from metric_kd.errors import UserError
from metric_kd.generators import restore, states_of
from metric_kd.losses.objective import Objective
from metric_kd.losses.term import PairTerm
from metric_kd.types import Batch, Output


class Replay:
    """The gradient of a step over R images of which a network takes ``chunk`` at a time.

    With the student's outputs y_c = f(x_c; w) of the chunks c and the loss L of all of them, dL/dw = sum_c (dy_c/dw)^T
    dL/dy_c. So the student runs over every chunk without a graph; L is computed from all outputs, and its gradients g_c in
    them kept; then every chunk runs again, with a graph and the same random numbers, and g_c is sent back through it. The
    student computes one forward pass more than in one batch of R, and the graph of one chunk is all that is held of it.
    The terms' own parameters get their gradients from L, once.

    Batch normalisation in the student normalises by a chunk, and moves its running statistics once for each, as if chunks
    were batches; without batch statistics the gradient is that of one batch of R. (Deviation from the paper: any output
    of the network is kept, not its embedding alone, and trained parts of terms are served.)

    Where processes share the R images, each has its part of every step; gradients are averaged afterwards, and no
    DistributedDataParallel is needed. Raises ``UserError`` for what :func:`check_replay` refuses.
    """

    def __init__(self, task: Task, chunk: int):
        if not isinstance(task, Solo):
            raise UserError("--relation_batch trains one student by a teacher or by labels; leave it out.")
        check_replay(task.objective)
        self.task, self.chunk = task, chunk

    def __call__(self, batch: Batch, scale: Scale) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradient of scale(loss) to every parameter, averaged over processes; the loss and its terms' values."""
        task, device = self.task, batch.labels.device
        parts = chunks(batch, self.chunk)
        teacher = joined([task.teacher_output(part) for part in parts])
        states, outputs = self._first_pass(parts)
        student = joined(outputs)
        leaves = [leaf.requires_grad_() for leaf in tensors(student) if leaf.is_floating_point()]
        total, values = task.compare(student, teacher, batch)
        scale(total).backward()
        if student is not None:
            after = states_of(device)
            gradients = _shares([leaf.grad for leaf in leaves], outputs)
            del student, leaves, teacher, outputs
            for part, state, grads in zip(parts, states, gradients, strict=True):
                restore(state, device)
                _send_back(task.student_output(part), grads)
            restore(after, device)
        average_gradients(task.parameters())
        return total.detach(), values

    def _first_pass(self, parts: Sequence[Batch]) -> tuple[list[Any], list[Output | None]]:
        """Random states before every chunk, and the student's outputs without a graph; its buffers stay as they are."""
        task = self.task
        kept = [(buffer, buffer.clone()) for buffer in task.student.buffers()]
        states, outputs = [], []
        for part in parts:
            states.append(states_of(part.labels.device))
            # Compiled code differs with and without a graph, and its random numbers may: there the graph is made, and dropped.
            with torch.set_grad_enabled(bool(task.compiled)):
                output = task.student_output(part)
            outputs.append(None if output is None else detached(output))
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        return states, outputs


def check_replay(objective: Objective) -> None:
    """Raise ``UserError`` for losses that need the networks' graphs, or the networks."""
    for key, term in objective.items():
        if term.differentiates:
            raise UserError(
                f"loss {key!r} takes gradients of what the networks give, which --relation_batch computes without a graph; "
                "leave one of the two out."
            )
        if isinstance(term, PairTerm) and not term.relates:
            raise UserError(
                f"loss {key!r} runs the networks itself, on the whole batch at once; leave it or --relation_batch out."
            )


def chunks(batch: Batch, size: int) -> list[Batch]:
    """The batch in parts of ``size``, the last perhaps shorter; one image alone, on which batch normalisation cannot train,
    goes with the part before it.
    """
    count = len(batch.labels)
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], count]
    return [
        Batch(*(None if t is None else t[start:end] for t in batch))  # type: ignore[arg-type]
        for start, end in zip(starts, ends, strict=True)
    ]


def joined(values: Sequence[Any]) -> Any:
    """Outputs of several chunks as that of all of them, tensor by tensor."""
    first = values[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, dict):
        return {key: joined([value[key] for value in values]) for key in first}
    entries = [joined(column) for column in zip(*values, strict=True)]
    return Output(*entries) if isinstance(first, Output) else tuple(entries)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of an output, in an order of their own."""
    if isinstance(value, Tensor):
        return [value]
    entries = value.values() if isinstance(value, dict) else value or ()
    return [tensor for entry in entries for tensor in tensors(entry)]


def _shares(gradients: Sequence[Tensor | None], outputs: Sequence[Output | None]) -> list[list[Tensor | None]]:
    """[chunk][tensor]: its rows of every gradient; None where a tensor has none."""
    sizes = [[len(tensor) for tensor in tensors(output) if tensor.is_floating_point()] for output in outputs]
    columns = [
        [None] * len(outputs) if gradient is None else list(gradient.split([size[place] for size in sizes]))
        for place, gradient in enumerate(gradients)
    ]
    return [[column[number] for column in columns] for number in range(len(outputs))]


def _send_back(output: Output | None, gradients: Sequence[Tensor | None]) -> None:
    """Gradients in a chunk's outputs to gradients of parameters; what is frozen has no graph."""
    replayed = [tensor for tensor in tensors(output) if tensor.is_floating_point()]
    pairs = [(t, g) for t, g in zip(replayed, gradients, strict=True) if g is not None and t.requires_grad]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over all processes of every gradient that one of them has, and zero where another has not."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if world_size() == 1 or not parameters:
        return
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    trained = [p for p, some in zip(parameters, average(there).tolist(), strict=True) if some]
    for dtype in sorted({p.dtype for p in trained}, key=str):
        alike = [p for p in trained if p.dtype == dtype]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
        mean = average(torch.cat([gradient.reshape(-1) for gradient in own]))
        for parameter, part in zip(alike, mean.split([p.numel() for p in alike]), strict=True):
            parameter.grad = part.view(parameter.shape)
