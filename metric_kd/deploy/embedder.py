"""Embedder: a trained network for someone who only wants vectors."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metric_kd.data.decode import pixels_of as pixels_of
from metric_kd.data.folder import images_in as images_in
from metric_kd.data.folder import is_image as is_image
from metric_kd.data.transforms import Geometry, resize
from metric_kd.deploy.bridge import Bridge, bridge_from
from metric_kd.devices import autocast
from metric_kd.engine.checkpoint import find_checkpoint, read_checkpoint
from metric_kd.engine.run_plugins import explained
from metric_kd.errors import UserError
from metric_kd.models.network import Network, NetworkSpec, build_network, load_weights


class Embedder:
    """A network in eval mode with the test view of its training: resize, centre crop, its own normalisation.

    bridge: a map that the embeddings go through, or None.
    """

    def __init__(
        self,
        network: Network,
        device: "torch.device | str" = "cpu",
        precision: str = "fp32",
        bridge: Bridge | None = None,
    ):
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.precision = precision
        self.bridge = bridge
        assert network.spec.input_size is not None
        self.geometry = Geometry(input_size=network.spec.input_size, flip=False)

    @property
    def dimensions(self) -> int:
        """D of what :meth:`embed` gives."""
        return self.network.embedding_size if self.bridge is None else len(self.bridge.shift)

    @property
    def normalised(self) -> bool:
        """Whether what :meth:`embed` gives has length 1."""
        return self.bridge is None and bool(self.network.spec.l2normalize)

    def embed(
        self, images: Any, batch: int = 64, progress: bool = False, skipped: list[Any] | None = None
    ) -> np.ndarray:
        """(N, D) float32 embeddings of N images.

        images: file names, PIL images or (H, W, 3) uint8 arrays, mixed as you like, or one of these (see
        :func:`metric_kd.data.decode.pixels_of`: the same photo gives the same vector); or one (N, 3, H, W) uint8 tensor or
        (N, H, W, 3) uint8 array. Raises ``UserError`` for an unreadable file (named) and for anything else,
        unless ``skipped`` is a list: then such images are added to it, and left out; and for a batch below 1.
        """
        images = several(images, batch)
        count = len(images)
        vectors: list[np.ndarray] = []
        starts = range(0, count, batch)
        for start in tqdm(starts, desc="embedding", unit="batch", disable=not progress, leave=False):
            views = self._views(images[start : start + batch], skipped)
            if not views:
                continue
            with torch.inference_mode(), autocast(self.device, self.precision):
                output = self.network(torch.stack(views).to(self.device), want=("embedding",))
            assert output.embedding is not None
            embedding = output.embedding.float().cpu()
            vectors.append((embedding if self.bridge is None else self.bridge(embedding)).numpy())
        if not vectors:
            return np.empty((0, self.dimensions), dtype=np.float32)
        return np.concatenate(vectors)

    def _views(self, images: Any, skipped: list[Any] | None) -> list[Tensor]:
        views = []
        for image in images:
            try:
                views.append(self._view(image))
            except UserError:
                if skipped is None:
                    raise
                skipped.append(image)
        return views

    def _view(self, image: Any) -> Tensor:
        pixels = pixels_of(image)
        height, width = pixels.shape[1:]
        if not self.geometry.keeps(height, width):
            pixels = resize(pixels[None], self.geometry.side)[0]
        side, size = pixels.shape[-1], self.geometry.crop
        corner = (side - size) // 2
        return pixels[:, corner : corner + size, corner : corner + size]


def several(images: Any, batch: int) -> Any:
    """What :meth:`Embedder.embed` was given, as something of a length. Raises ``UserError`` for a batch below 1."""
    if batch < 1:
        raise UserError(f"batch is {batch}; give 1 or more.")
    one = isinstance(images, str | Path) or hasattr(images, "convert") or getattr(images, "ndim", None) in (2, 3)
    return [images] if one else images


def load(
    run_or_checkpoint: "str | Path", device: str = "cpu", precision: str = "fp32", bridge: bool = False
) -> Embedder:
    """The network of a run directory or checkpoint, ready to embed: ``metric_kd.load("runs/x").embed(["a.jpg"])``.

    bridge: give vectors in the space of the student's teacher, through the map that ``run_distill.py --bridge`` has stored
    with it; compare directions there if the teacher's embeddings have length 1. Raises ``UserError`` where the file is
    missing, damaged, or a plain state dict, which does not describe its network, and where it holds no bridge.
    """
    content = read_checkpoint(run_or_checkpoint)
    if "network" not in content:
        raise UserError(
            f"{find_checkpoint(run_or_checkpoint)} is a plain state dict, which does not say what network it belongs to; "
            "evaluate it with run.py --mode eval and its flags, or build_network and load_weights."
        )
    with explained(run_or_checkpoint):
        network = build_network(NetworkSpec.from_dict(content["network"]))
    load_weights(network, content["model"], strict=True)
    if bridge and "bridge" not in content:
        raise no_bridge(run_or_checkpoint)
    return Embedder(network, device, precision, bridge_from(content["bridge"]) if bridge else None)


def no_bridge(run_or_checkpoint: "str | Path") -> UserError:
    return UserError(f"{run_or_checkpoint} holds no bridge; train it with run_distill.py --bridge ridge.")
