"""torch.compile for the forward passes of training. The networks themselves stay as they are: their names, files, evaluation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from metric_kd.errors import UserError
from metric_kd.types import Output

BACKEND = "inductor"
"""What torch.compile hands its graphs to."""


class Compiled:
    """A network's forward pass as compiled code, made at the first call with images of a shape and fields of an output.

    Every shape has code of its own (``dynamic=False``): which code computes a batch then depends on the batch alone and
    not on the batches before, so that a resumed run repeats it bit for bit. Raises ``UserError`` for what cannot be
    compiled.
    """

    def __init__(self, network: nn.Module):
        self._call = torch.compile(network.forward, backend=BACKEND, dynamic=False)

    def __call__(self, images: Tensor, want: tuple[str, ...] = ("embedding",)) -> Output:
        try:
            output: Output = self._call(images, want=want)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(f"the network cannot be compiled ({_reason(error)}); leave --compile out.") from error
        return output


def compiled(networks: Iterable[nn.Module], device: torch.device) -> dict[nn.Module, Callable[..., Output]]:
    """Network -> its :class:`Compiled` forward pass, for :attr:`metric_kd.engine.tasks.Task.compiled`.

    A first small function is compiled at once. Raises ``UserError`` where that fails: a C++ compiler is missing, or, for
    CUDA, Triton.
    """
    try:
        torch.compile(_small, backend=BACKEND, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds, from the search for a compiler to the loading of what it made
        raise UserError(
            f"--compile found no compiler that works ({_reason(error)}); install g++ (for CUDA: Triton), or leave --compile out."
        ) from error
    return {network: Compiled(network) for network in networks}


def _small(x: Tensor) -> Tensor:
    return torch.relu(x * 2 + 1)


def _reason(error: BaseException) -> str:
    """The first line that says something."""
    lines: list[Any] = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.endswith("raised:")]
    return (said or lines or [type(error).__name__])[0].rstrip(".")
