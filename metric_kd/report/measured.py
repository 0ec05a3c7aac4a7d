"""Measured and TestSet: what a report knows about networks that were tested on the same images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from metric_kd.evaluation.statistics import Interval
from metric_kd.report.cost import Cost
from metric_kd.report.gallery import ImageOf
from metric_kd.report.runs import RunSummary
from metric_kd.types import Neighbours


@dataclass(frozen=True)
class Recipe:
    """How a run was made. trained_on: in words; fingerprint: of the training images; selection: which epoch is the result;
    family: equal for runs that differ in nothing but their seed; settings: those that are not the defaults; environment:
    versions and machine.
    """

    losses: tuple[str, ...]
    epochs: int
    seed: int
    trained_on: str
    fingerprint: str
    selection: str
    family: str
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One network. scores: metric, as people call it -> interval, the main one first. further: what else its run measured,
    as fractions: prefixes, other data sets. teacher: the title of its teacher on the page. recipe: None for a network that
    is only a file.

    Of networks that embed: hits: (Q,), 1 where the first metric counts a query as found; found: the neighbours of every
    query; vectors: (N, D), labels: (N,) of all test images. None for classifiers.
    """

    summary: RunSummary
    base: str
    cost: Cost
    scores: Mapping[str, Interval]
    teacher: str | None = None
    recipe: Recipe | None = None
    hits: Tensor | None = None
    found: Neighbours | None = None
    vectors: Tensor | None = None
    labels: Tensor | None = None
    further: Mapping[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.summary.title


@dataclass(frozen=True)
class TestSet:
    """Networks that were tested on the same images. name: of the data set; queries: how many images were asked about;
    described: the images in words; query_images: their pictures, where networks embed; gallery_images: those of a gallery of its
    own.
    """

    __test__ = False  # its name does not make it a test

    name: str
    described: str
    queries: int
    class_names: Sequence[str]
    networks: Sequence[Measured]
    query_images: ImageOf | None = None
    gallery_images: ImageOf | None = None

    def network(self, title: str | None) -> Measured | None:
        return next((network for network in self.networks if network.title == title), None)

    @property
    def metrics(self) -> list[str]:
        """Those that all networks have, in the order of the first."""
        return [name for name in self.networks[0].scores if all(name in network.scores for network in self.networks)]
