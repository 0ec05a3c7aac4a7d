"""How alike two networks are inside, and how much their answers say beyond the class they name."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from metric_kd.devices import autocast
from metric_kd.errors import UserError
from metric_kd.evaluation.embed import with_bar
from metric_kd.modes import eval_mode
from metric_kd.types import Batch


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """|Y'X|^2 / (|X'X| |Y'Y|) of the centred (N, C) and (N, D) representations of the same N images, a scalar in 0..1.

    Frobenius norms; in float64 throughout. One that is the same for all images is like nothing: 0. Raises ``UserError``
    where the numbers of images differ.

    Kornblith, Norouzi, Lee, Hinton: Similarity of Neural Network Representations Revisited, 2019, arXiv 1905.00414.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise UserError(
            f"linear CKA compares (N, C) and (N, D) representations of the same images; got {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    x, y = _centred(x), _centred(y)
    if len(x) < min(x.shape[1], y.shape[1]):  # the same three numbers from N x N products
        gram_x, gram_y = x @ x.T, y @ y.T
        both, own = (gram_x * gram_y).sum(), gram_x.norm() * gram_y.norm()
    else:
        both, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return torch.where(own > 0, both / torch.where(own > 0, own, 1.0), 0.0)


def _centred(x: Tensor) -> Tensor:
    x = x.detach().double()
    return x - x.mean(0)


def non_target_noise(logits: Tensor) -> Tensor:
    """(N,): sum over the classes k but the likeliest of |p_k - (1 - p_max) / (K - 1)|, of (N, K) logits, K >= 2.

    How unevenly an answer shares out what it leaves to the other classes: 0 where it tells them not apart.

    Shao, Chen: Multi-granularity for knowledge distillation, 2021, arXiv 2108.06681; its program is written for 4 classes.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(
            f"the noise of the other classes needs (N, K) logits of 2 classes or more; got {tuple(logits.shape)}."
        )
    p = logits.detach().double().softmax(1)
    likeliest = p.max(1, keepdim=True)
    even = (1 - likeliest.values) / (logits.shape[1] - 1)
    return (p - even).abs().scatter(1, likeliest.indices, 0.0).sum(1)


def representations(
    network: nn.Module,
    batches: Iterable[Batch],
    want: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    progress: str | None = None,
    total: int | None = None,
) -> dict[str, Tensor]:
    """Layer -> (N, C) float32 on the CPU, from the stem to the output: maps averaged over their pixels ("stem", "stage 1",
    ...), "pooled", "abstract" and "detailed" (codes), "embedding", "logits"; ``want`` names fields of ``Output``.

    The network is in eval mode meanwhile. Raises ``UserError`` where there are no images.
    """
    device = torch.device(device)
    parts: dict[str, list[Tensor]] = {}
    with eval_mode(network), torch.inference_mode(), autocast(device, precision):
        for batch in with_bar(batches, progress, total):
            output = network(batch.images.to(device, non_blocking=True), want=tuple(want))
            layers = {f"stage {k}" if k else "stem": m.float().mean((2, 3)) for k, m in enumerate(output.maps or ())}
            codes = output.codes or (None, None)
            layers |= {"pooled": output.pooled, "abstract": codes[0], "detailed": codes[1]}
            layers |= {"embedding": output.embedding, "logits": output.logits}
            for name, value in layers.items():
                if value is not None:
                    parts.setdefault(name, []).append(value.float().cpu())
    if not parts:
        raise UserError("there are no images to look at; check that the data set is not empty.")
    return {name: torch.cat(values) for name, values in parts.items()}
