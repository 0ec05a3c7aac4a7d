"""Information discarding: how much of each part of an image may be noise before a feature notices.

Cheng, Rao, Chen, Zhang: Explaining Knowledge Distillation by Quantifying the Knowledge, CVPR 2020, arXiv 2003.03622.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metric_kd.distances import at_least_float32
from metric_kd.errors import UserError
from metric_kd.quantify.search import Search

Feature = Callable[[Tensor], Tensor]


class History(NamedTuple):
    """Every iteration t of every image n, before its step: sigma (T, N, S, S), mean entropy (T, N) in nats, and change
    (T, N) of the feature in its unit. NaN after an image's search has ended."""

    sigma: Tensor
    entropy: Tensor
    change: Tensor


class Discarding(NamedTuple):
    """What was found for N images, on the CPU: sigma (N, S, S) in normalised pixels, entropy (N, S, S) in nats, unit (N,)
    of the feature's change, chosen (N,) the iteration, and the history.

    An image to which the feature does not answer at all has unit 0 and NaN everywhere else (chosen: -1).
    """

    sigma: Tensor
    entropy: Tensor
    unit: Tensor
    chosen: Tensor
    history: History

    @property
    def answered(self) -> Tensor:
        """(N,) bool: False for images to which the feature does not answer."""
        return self.chosen >= 0


def entropy(sigma: Tensor) -> Tensor:
    """H = log sigma + log(2 pi e) / 2, in nats: the entropy of a normal variable of that deviation, elementwise."""
    return sigma.log() + 0.5 * math.log(2 * math.pi * math.e)


class Noise:
    """Standard normal noise: every image has a generator of its own, so that it does not depend on its neighbours.

    Seeded by (seed, key of the image): the same image meets the same noise in every network and at every checkpoint.
    """

    def __init__(
        self,
        seed: int,
        keys: Sequence[int],
        shape: torch.Size,
        search: Search,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.shape, self.antithetic, self.dtype, self.device = shape, search.antithetic, dtype, device
        self.draws = search.draws // 2 if search.antithetic else search.draws
        self.generators = []
        for key in keys:
            word = int(np.random.SeedSequence([seed, key]).generate_state(1, np.uint64)[0])
            self.generators.append(torch.Generator(device).manual_seed(word))

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), draws, C, H, W): the next draws of these images."""
        out = torch.empty((len(rows), self.draws, *self.shape), dtype=self.dtype, device=self.device)
        for k, row in enumerate(rows):
            torch.randn(out[k].shape, generator=self.generators[row], out=out[k])
        return torch.cat([out, -out], 1) if self.antithetic else out


def information_discarding(
    feature: Feature,
    images: Tensor,
    search: Search | None = None,
    *,
    scale: Tensor | float = 1.0,
    seed: int = 0,
    keys: Sequence[int] | None = None,
    batch: int | None = None,
    noise: Callable[[Sequence[int]], Tensor] | None = None,
) -> Discarding:
    """The largest noise per cell of each image that leaves a feature nearly as it is.

    For each image x with clean feature f: minimise over sigma the loss

        mean |f(x + up(sigma) eps / scale) - f|^2 / unit  -  lam * mean_i H(sigma_i),    eps ~ N(0, 1),

    up: nearest, to the size of the image; unit: the same mean square at sigma = ``start``; see :class:`Search` for the
    rest and for the paper's form. Images are searched together but each for itself, and the result does not depend on
    which are searched together (but for rounding).

    feature: (M, C, H, W) -> (M, ...), deterministic, each image for itself (a network in eval mode), in float32 or
    better: half precision rounds away the noise that is looked for. images: (N, C, H, W), uint8 or float. scale: what
    the feature multiplies pixels by first, to broadcast over an image: sigma is in those units. seed, keys: image n
    draws its noise from (seed, keys[n]); keys default to 0..N-1. batch: noisy images per call of the feature; None: by
    their size and the device. noise: in place of the generators, rows -> (len(rows), draws, C, H, W). Raises
    ``UserError`` where the images are no such batch or are smaller than the grid, and for seeds, keys and batches that
    cannot be.
    """
    search = search or Search()
    if images.ndim != 4 or not len(images):
        raise UserError(f"images have shape {tuple(images.shape)}; give (N, C, H, W) with N of 1 or more.")
    if min(images.shape[2:]) < search.grid:
        size = "x".join(map(str, images.shape[2:]))
        raise UserError(f"a grid of {search.grid} cells does not fit images of {size} px; give a smaller grid.")
    images = at_least_float32(images) if images.is_floating_point() else images.float()
    keys = range(len(images)) if keys is None else keys
    if len(keys) != len(images) or min(seed, *keys) < 0:
        raise UserError(
            f"noise is drawn by a seed and one key per image, 0 or more; got {len(keys)} for {len(images)} images."
        )
    if batch is not None and batch < 1:
        raise UserError(f"batch is {batch}; give 1 noisy image per call or more.")
    if noise is None:
        noise = Noise(seed, keys, images.shape[1:], search, images.dtype, images.device)
    batch = noisy_per_call(max(images.shape[2:]), images.device) if batch is None else batch
    together = max(1, batch // search.draws)
    parts = [
        _Group(feature, images, rows, search, scale, batch, noise).run()
        for rows in torch.arange(len(images)).split(together)
    ]
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("sigma", "unit", "chosen")]
    history = History(*(torch.cat(columns, 1) for columns in zip(*(part.history for part in parts), strict=True)))
    return Discarding(joined[0], entropy(joined[0]), joined[1], joined[2], history)


def noisy_per_call(side: int, device: torch.device) -> int:
    """Noisy images of ``side`` px per call: on a processor, more did not make small networks faster, and large ones need
    memory; an accelerator wants more of them to be busy.
    """
    images = max(8, min(192, 192 * 64**2 // side**2))
    return images if device.type == "cpu" else 8 * images


class _Group:
    """The search for some images at once: one optimisation each, in shared calls of the feature."""

    def __init__(
        self,
        feature: Feature,
        images: Tensor,
        rows: Tensor,
        search: Search,
        scale: Tensor | float,
        batch: int,
        noise: Callable[[Sequence[int]], Tensor],
    ):
        self.feature, self.search, self.scale, self.noise = feature, search, scale, noise
        self.rows, self.images = rows.tolist(), images[rows]
        self.slice = max(1, min(batch, search.draws))
        with torch.no_grad():
            self.clean = self._read(self.images)

    def run(self) -> Discarding:
        search, count = self.search, len(self.rows)
        unit = self._unit()
        shape = (search.iterations, count, search.grid, search.grid)
        sigmas = torch.full(shape, math.nan, dtype=self.images.dtype, device=self.images.device)
        levels = torch.full(shape[:2], math.nan, dtype=self.images.dtype, device=self.images.device)
        changes = levels.clone()
        searching = torch.nonzero((unit > 0) & unit.isfinite()).flatten()
        sigma = torch.full(shape[1:], search.start, dtype=self.images.dtype, device=self.images.device)
        weight = torch.full((count,), search.weight, dtype=self.images.dtype, device=self.images.device)
        for t in range(search.iterations):
            if t == search.check and search.form == "reference":
                # The reference looks once: an image whose noise was large enough by then is done, the others are pushed.
                reached = levels[:t, searching].amax(0) > search.target
                searching = searching[~reached]
                weight[searching] *= search.push
            if not len(searching):
                break
            now = sigma[searching]
            change, gradient = self._change(now, searching, unit[searching])
            sigmas[t, searching], changes[t, searching] = now, change
            levels[t, searching] = entropy(now).mean((1, 2))
            gradient -= weight[searching, None, None] / (now * search.grid**2)  # of lam * mean H
            sigma[searching] = (now - search.rate * gradient).clamp(search.low, search.high)
        return self._result(unit, History(sigmas, levels, changes))

    def _result(self, unit: Tensor, history: History) -> Discarding:
        levels = history.entropy
        if self.search.form == "paper":
            chosen = torch.where(levels[-1].isnan(), -1, len(levels) - 1)
        else:
            gap = (levels - self.search.target).abs().nan_to_num(nan=math.inf)
            chosen = torch.where(gap.isinf().all(0), -1, gap.argmin(0))
        sigma = history.sigma[chosen.clamp(min=0), torch.arange(len(chosen), device=chosen.device)]
        sigma = torch.where(chosen[:, None, None] < 0, math.nan, sigma)
        on_cpu = History(*(part.cpu() for part in history))
        return Discarding(sigma.cpu(), entropy(sigma).cpu(), unit.cpu(), chosen.cpu(), on_cpu)

    def _unit(self) -> Tensor:
        """(N,): mean squared change of the feature under noise of ``start``; paper: its variance around its own mean."""
        start = torch.full((), self.search.start, dtype=self.images.dtype, device=self.images.device)
        everything = torch.arange(len(self.rows), device=self.images.device)
        squares: list[Tensor] = []
        sums: list[Tensor] = []
        with torch.no_grad():
            for part in self._draws(everything):
                gap = self._gap(part, start.expand(len(part), 1, 1), everything)
                squares.append(gap.square().flatten(2).mean(2).sum(1))
                sums.append(gap.sum(1))
        square = torch.stack(squares).sum(0) / self.search.draws
        if self.search.form == "reference":
            return square
        mean = torch.stack(sums).sum(0) / self.search.draws
        return square - mean.square().flatten(1).mean(1)

    def _change(self, sigma: Tensor, which: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Change (M,) of the feature of the images ``which``, in its unit, and its gradient (M, S, S) by sigma."""
        change = torch.zeros_like(unit)
        gradient = torch.zeros_like(sigma)
        for part in self._draws(which):
            leaf = sigma.clone().requires_grad_()
            gap = self._gap(part, leaf, which)
            value = gap.square().flatten(2).mean(2).sum(1) / (self.search.draws * unit)
            gradient += torch.autograd.grad(value.sum(), leaf)[0]  # images do not touch each other
            change += value.detach()
        return change, gradient

    def _draws(self, which: Tensor) -> Sequence[Tensor]:
        """The next noise of these images, (M, draws, C, H, W), cut along the draws into what one call can take."""
        return self.noise([self.rows[k] for k in which.tolist()]).split(self.slice, 1)

    def _gap(self, noise: Tensor, sigma: Tensor, which: Tensor) -> Tensor:
        """(M, D, ...): what D draws of noise of deviation sigma (M, s, s) change in the feature."""
        height, width = self.images.shape[2:]
        up = F.interpolate(sigma[:, None], size=(height, width), mode="nearest")
        noisy = torch.addcmul(self.images[which][:, None], noise, (up / self.scale)[:, None])
        # This layout made convolutions twice as fast.
        read = self._read(noisy.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return read.unflatten(0, noisy.shape[:2]) - self.clean[which][:, None]

    def _read(self, images: Tensor) -> Tensor:
        features = self.feature(images).to(self.images.dtype)
        return F.relu(features) if self.search.relu else features
