"""Which images make a batch: functions of (seed, epoch), the same on every rank and after a resume."""

import numpy as np

from metric_kd.errors import UserError


def distinct(rng: np.random.Generator, population: np.ndarray, draws: int) -> np.ndarray:
    """(R, draws) int64: row r holds distinct numbers of 0 .. population[r]-1 in random order, -1 where there are fewer.

    Floyd's algorithm (Bentley and Floyd, CACM 30(9), 1987) for all rows at once; it gives a random set, so the order
    is drawn afterwards.
    """
    rows = len(population)
    take = np.minimum(population, draws)
    chosen = np.full((rows, draws), -1, dtype=np.int64)
    u = rng.random((draws, rows))
    for step in range(draws):
        last = population - take + step
        pick = (u[step] * (last + 1)).astype(np.int64)
        seen = (chosen[:, :step] == pick[:, None]).any(1)
        chosen[:, step] = np.where(step < take, np.where(seen, last, pick), -1)
    order = np.argsort(np.where(chosen < 0, 2.0, rng.random((rows, draws))), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, epoch])  # numpy takes no negative seeds


def _rank_slice(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    share = len(batch) // world
    return batch[rank * share : (rank + 1) * share]


def _check_world(batch: int, rank: int, world: int) -> None:
    if batch < 1:
        raise UserError(f"--batch is {batch}; give a positive number.")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world}.")
    check_share(batch, world)


def check_share(batch: int, world: int) -> None:
    """Raise ``UserError`` where a batch cannot be shared evenly; known before any data are."""
    if batch % world:
        raise UserError(f"--batch {batch} is shared by {world} processes; make it a multiple of {world}.")


class ClassBalancedBatches:
    """Batches of a few classes with several images each (the reference's NPairs sampler).

    Every batch permutes all classes and takes up to ``per_class`` random images of each, without replacement, until it
    is full; the last class is cut short. A data set that cannot fill a batch gives smaller ones, of which several ranks
    leave out the fewer than ``world`` images that cannot be shared evenly.

    labels: (N,) int64. batch: images over all ranks; a rank gets its even share, in order. iterations: batches per
    epoch. pairs: whether every class must offer a positive pair. Raises ``UserError`` where a batch holds one class
    only, or (``pairs``) a class has one image; ``class_names`` are for that message.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch: int,
        per_class: int,
        iterations: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        *,
        pairs: bool = True,
        class_names: "tuple[str, ...] | None" = None,
    ):
        _check_world(batch, rank, world)
        labels = np.asarray(labels)
        if per_class < (2 if pairs else 1):
            raise UserError(f"{per_class} images per class give no positive pair; take 2 or more.")
        if iterations < 1:
            raise UserError(f"{iterations} batches per epoch train nothing; give 1 or more.")
        classes, counts = np.unique(labels, return_counts=True)
        if len(classes) < 2:
            raise UserError(f"the training images have {len(classes)} class; a batch needs two classes or more.")
        if batch <= min(per_class, counts.max()):
            raise UserError(
                f"--batch {batch} is a batch smaller than two classes of {per_class} images; raise it above {per_class}"
                " or take fewer images per class."
            )
        if pairs and counts.min() < 2:
            lonely = classes[counts.argmin()]
            name = class_names[lonely] if class_names is not None else str(lonely)
            raise UserError(f"class {name!r} has one image and cannot give a pair; add images to it or remove it.")
        self.batch, self.per_class, self.iterations, self.seed = batch, per_class, iterations, seed
        self.rank, self.world = rank, world
        self._counts = counts
        self._order = np.argsort(labels, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._take = np.minimum(counts, per_class)
        largest = min(batch, int(self._take.sum()))
        if largest < world:
            raise UserError(f"batches have {largest} images for {world} processes; give more images, or start fewer.")
        self.held = largest - largest % world
        """Images in a batch over all ranks: ``batch``, or as many as there are."""

    def __len__(self) -> int:
        return self.iterations

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The index arrays of this rank in this epoch, (batch / world,) int64 each."""
        rng = _generator(self.seed, epoch)
        classes = self._classes(rng)
        picks = distinct(rng, self._counts[classes].ravel(), self.per_class)
        images = self._order[np.minimum(self._starts[classes].reshape(-1, 1) + picks, len(self._order) - 1)]
        images = images.reshape(self.iterations, -1)
        there = picks.reshape(self.iterations, -1) >= 0
        return [
            _rank_slice(row[mask][: self.batch], self.rank, self.world) for row, mask in zip(images, there, strict=True)
        ]

    def _classes(self, rng: np.random.Generator) -> np.ndarray:
        """(iterations, k) different classes in random order, enough of them to fill a batch."""
        total = len(self._counts)
        enough = min(total, -(-self.batch // int(self._take.min())))
        if enough * enough > 10 * total:  # Floyd's checks would cost more than sorting everything
            return np.argsort(rng.random((self.iterations, total)), axis=1)[:, :enough]
        return distinct(rng, np.full(self.iterations, total), enough)


class ShuffledBatches:
    """Every image once per pass, in random order; the last batch of a pass may be short.

    An epoch is one pass or, with ``iterations``, that many batches: a longer one goes on with another order. With several
    ranks each batch is shared evenly, and the fewer than ``world`` images that are left over at the end of a pass are not
    used in it; nor is a last batch of one image per rank, which batch normalisation cannot train on. ``drop_last`` leaves
    any short last batch out.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        *,
        drop_last: bool = False,
        iterations: int | None = None,
    ):
        _check_world(batch, rank, world)
        if count < world:
            raise UserError(f"there are {count} training images for {world} processes; give more images.")
        if iterations is not None and iterations < 1:
            raise UserError(f"{iterations} batches per epoch train nothing; give 1 or more.")
        self.count, self.batch, self.seed, self.rank, self.world = count, batch, seed, rank, world
        full, rest = divmod(count // world * world, batch)
        self.per_pass = full + (rest > 0) if full == 0 or (rest // world > 1 and not drop_last) else full
        self.iterations = iterations or self.per_pass

    def __len__(self) -> int:
        return self.iterations

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The index arrays of this rank in this epoch."""
        rng = _generator(self.seed, epoch)
        batches: list[np.ndarray] = []
        while len(batches) < self.iterations:
            order = rng.permutation(self.count)
            starts = range(0, self.per_pass * self.batch, self.batch)
            batches += [_rank_slice(order[s : s + self.batch], self.rank, self.world) for s in starts]
        return batches[: self.iterations]
