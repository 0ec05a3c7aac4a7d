"""Geometry on uint8 images: resize, crop and flip, drawn from (seed, epoch, index) and nothing else.

The draw of an image does not depend on its place in a batch, on workers or on any global generator, so a run can be
resumed, and its loader be changed, without changing what the network sees.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metric_kd.errors import UserError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MEMORY_SIDE = 73
"""Images up to this side live in memory: what inputs of 64 px need before the crop (64 * 256 / 224)."""
SLICE_SIDE = 96
"""From this side on, copying rectangles image by image is faster than gathering pixels."""


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _word(number: int) -> np.ndarray:
    return np.array([number & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)  # an array wraps around where a scalar warns


def uniform(seed: int, epoch: int, indices: np.ndarray, draws: int) -> np.ndarray:
    """(N, draws) float64 in [0, 1): draw k of image i in this epoch, a pure function of the four numbers."""
    key = _mix(_word(seed) + GOLDEN)
    key = _mix(key + (_word(epoch) + np.uint64(1)) * GOLDEN)
    stream = _mix(key + np.asarray(indices).astype(np.uint64) * GOLDEN)
    counter = np.arange(1, draws + 1, dtype=np.uint64) * GOLDEN
    bits = _mix(stream[:, None] + counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def resize(images: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) uint8 to (N, 3, side, side): antialiased bilinear, aspect not kept."""
    if images.shape[-2:] == (side, side):
        return images
    images = images.contiguous(memory_format=torch.channels_last)
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)


class Crops(NamedTuple):
    """Where each image is cut: top, left (N,) int64, in padded coordinates; flip (N,) bool."""

    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray


@dataclass(frozen=True)
class Geometry:
    """From a stored image to what the student, and the teacher, see.

    Images are resized to ``side x side`` (aspect not kept), cropped at random and mirrored at random for training, and
    cropped at the centre for testing. Images that already have the size of the crop are padded by an eighth, reflected,
    and cropped at random (the habit of CIFAR); for testing they are taken as they are.

    input_size: px the student sees. teacher_input_size: px the teacher sees, if others: both see the same crop, which
    is drawn at the larger size and shrunk, antialiased, to the smaller. resize: px before the crop, default 256/224 of
    it. flip: whether training mirrors images at all.
    """

    input_size: int
    teacher_input_size: int | None = None
    resize: int | None = None
    flip: bool = True

    def __post_init__(self) -> None:
        if min(self.input_size, self.teacher_input_size or 1) < 1:
            raise UserError(f"--input_size is {self.input_size}; give a positive number of pixels.")
        if self.resize is not None and self.resize < self.crop:
            raise UserError(f"images resized to {self.resize} px cannot give crops of {self.crop} px; resize to more.")

    @property
    def crop(self) -> int:
        """px of the crop: the larger of the two inputs."""
        return max(self.input_size, self.teacher_input_size or 0)

    @property
    def side(self) -> int:
        """px before the crop, where images are resized."""
        return self.resize or round(self.crop * 256 / 224)

    def keeps(self, height: int, width: int) -> bool:
        """Whether images of this size are used as they are stored (and padded), instead of resized: small ones of the
        crop's size."""
        small = self.resize is None and self.side <= MEMORY_SIDE
        return height == width == self.crop and (small or self.resize == self.crop)

    def _pad(self, side: int) -> int:
        return self.crop // 8 if side == self.crop else 0

    def draw(self, seed: int, epoch: int, indices: np.ndarray, side: int) -> Crops:
        """Random crops of images of ``side`` px."""
        u = uniform(seed, epoch, indices, 3)
        places = side + 2 * self._pad(side) - self.crop + 1
        corner = np.minimum((u[:, :2] * places).astype(np.int64), places - 1)
        return Crops(corner[:, 0], corner[:, 1], (u[:, 2] < 0.5) & self.flip)

    def centre(self, count: int, side: int) -> Crops:
        """The centre crop of every image of ``side`` px."""
        corner = np.full(count, (side + 2 * self._pad(side) - self.crop) // 2, dtype=np.int64)
        return Crops(corner, corner, np.zeros(count, dtype=bool))

    def cut(self, pixels: np.ndarray, rows: np.ndarray, crops: Crops) -> Tensor:
        """Crops of ``pixels[rows]``: (M, side, side, 3) uint8 to (N, 3, crop, crop) uint8 in channels_last."""
        side, size = pixels.shape[1], self.crop
        pad = self._pad(side)
        if pad == 0 and size >= SLICE_SIDE:
            out = np.empty((len(rows), size, size, 3), dtype=np.uint8)
            for k, (row, top, left, flip) in enumerate(zip(rows, *crops, strict=True)):
                out[k] = pixels[row, top : top + size, left : left + size]
                if flip:  # torch mirrors a contiguous image ten times as fast as NumPy copies one backwards
                    out[k] = torch.from_numpy(out[k]).flip(1).numpy()
        else:
            out = self._gather(pixels, rows, crops, pad)
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def _gather(self, pixels: np.ndarray, rows: np.ndarray, crops: Crops, pad: int) -> np.ndarray:
        side, size = pixels.shape[1], self.crop
        reach = np.arange(size)
        reflect = np.abs(np.arange(-pad, side + pad))
        reflect = np.where(reflect >= side, 2 * (side - 1) - reflect, reflect)
        y = reflect[crops.top[:, None] + reach]
        x = reflect[crops.left[:, None] + np.where(crops.flip[:, None], reach[::-1], reach)]
        place = (np.asarray(rows)[:, None] * side + y)[:, :, None] * side + x[:, None, :]
        words = np.ascontiguousarray(pixels).reshape(-1).view("V3")  # one 3-byte word per pixel: one gather, not three
        return words[place].view(np.uint8).reshape(len(rows), size, size, 3)

    def views(self, crops: Tensor) -> tuple[Tensor, Tensor | None]:
        """(student's images, teacher's images or None where they are the same)."""
        student = resize(crops, self.input_size)
        if self.teacher_input_size in (None, self.input_size):
            return student, None
        return student, resize(crops, self.teacher_input_size)
