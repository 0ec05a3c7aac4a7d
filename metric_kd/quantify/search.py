"""The settings of the search for the noise that a feature does not notice.

Cheng, Rao, Chen, Zhang: Explaining Knowledge Distillation by Quantifying the Knowledge, CVPR 2020, arXiv 2003.03622.
"""

import math
from dataclasses import dataclass
from typing import Literal

from metric_kd.errors import UserError, one_of

FORMS = ("reference", "paper")


@dataclass(frozen=True)
class Search:
    """How the noise of an image is looked for; the defaults are the reference program's, but for ResNets, where its ``lam``
    is 6.

    grid: cells along a side, shared by the channels. start, low, high: sigma at first and its bounds, in normalised
    pixels. lam: weight of the mean entropy against the change of the feature; None: 7 (of the paper's form, which sums
    over cells, 7 / grid^2). lr: of plain gradient descent; None: 1e-4 (grid / 16)^2, for the gradient of a mean over
    cells falls with their number and 1e-4 belongs to 16 x 16. Where the mean entropy has not risen above ``target`` nats
    after ``check`` iterations, lam is multiplied by ``push``, else the search ends there; ``iterations`` end it in any
    case. The iteration whose mean entropy is nearest to ``target`` is the result. draws: noise images per iteration,
    fresh each time; antithetic: half of them mirror the other half. relu: compare what a ReLU leaves of the feature.

    form "paper" is the equation as we recall it from the paper, not as the program has it: the unit of change is the
    feature's variance around its own mean under noise, entropies are summed, lam never rises, and the last iteration is
    the result.
    """

    grid: int = 16
    start: float = 0.01
    low: float = 0.001
    high: float = 1.0
    lam: float | None = None
    lr: float | None = None
    iterations: int = 80
    check: int = 60
    push: float = 1.5
    target: float = -2.8
    draws: int = 96
    antithetic: bool = False
    relu: bool = True
    form: Literal["reference", "paper"] = "reference"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise one_of("form", self.form, FORMS)
        for name in ("grid", "iterations", "check", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more.")
        if not 0 < self.low <= self.start <= self.high < math.inf:
            raise UserError(
                f"sigma starts at {self.start} and keeps to {self.low}..{self.high}; give 0 < low <= start <= high."
            )
        if not math.isfinite(self.target):
            raise UserError(f"target is {self.target}; give a finite number of nats.")
        for name in ("lam", "lr", "push"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}; give a positive number.")
        if self.draws % 2 and self.antithetic:
            raise UserError(f"antithetic noise comes in pairs and draws is {self.draws}; give an even number.")

    @property
    def weight(self) -> float:
        """What the mean entropy of an image is multiplied by, at first."""
        cells = self.grid**2
        if self.form == "paper":
            return 7.0 if self.lam is None else self.lam * cells
        return 7.0 if self.lam is None else self.lam

    @property
    def rate(self) -> float:
        return 1e-4 * (self.grid / 16) ** 2 if self.lr is None else self.lr
