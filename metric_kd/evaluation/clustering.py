"""How well clusters of the embeddings agree with the classes: k-means and normalised mutual information (NMI)."""

import torch
from torch import Tensor

from metric_kd.errors import UserError
from metric_kd.evaluation.search import as_integers, as_vectors, backend, find_neighbours, load_faiss

ITERATIONS = 20
"""Of k-means; pytorch-metric-learning has as many."""


def normalised_mutual_information(labels: Tensor, clusters: Tensor) -> float:
    """NMI = 2 I(labels; clusters) / (H(labels) + H(clusters)) of two (N,) columns of integers, in 0..1.

        I = sum_ij n_ij/N log(N n_ij / (n_i n_j)),    H = -sum_i n_i/N log(n_i/N)

    n_ij counts the images of class i in cluster j. Both columns constant: 1, as scikit-learn has it. In float64; memory
    O(N), for only the pairs that occur are counted. Which names the classes and clusters have does not matter. Raises
    ``UserError`` where the lengths differ or are 0.
    """
    labels, clusters = as_integers(labels), as_integers(clusters)
    if labels.ndim != 1 or labels.shape != clusters.shape or len(labels) == 0:
        raise UserError(
            f"NMI compares the classes and the clusters of the same images; got {tuple(labels.shape)} and "
            f"{tuple(clusters.shape)}."
        )
    _, classes, of_class = labels.unique(return_inverse=True, return_counts=True)
    _, groups, of_group = clusters.unique(return_inverse=True, return_counts=True)
    pairs, both = (classes * len(of_group) + groups).unique(return_counts=True)
    total = len(labels)
    expected = of_class[pairs // len(of_group)].double() * of_group[pairs % len(of_group)]
    share = both.double() / total
    information = (share * (total * both / expected).log()).sum()
    entropies = _entropy(of_class, total) + _entropy(of_group, total)
    if entropies == 0:
        return 1.0
    return float((2 * information / entropies).clamp(0, 1))


def _entropy(counts: Tensor, total: int) -> Tensor:
    share = counts.double() / total
    return -(share * share.log()).sum()


def kmeans(
    vectors: Tensor, count: int, *, seed: int = 0, iterations: int = ITERATIONS, prefer: str | None = None
) -> Tensor:
    """(N,) int64, the cluster in 0 .. count-1 of every row of (N, D), by Euclidean k-means from random rows.

    Through faiss, which fits the centres on at most 256 rows per cluster drawn at random (its default); or, where it is
    not installed, by Lloyd's algorithm on all rows, where a cluster that lost all its rows starts again at the row farthest
    from its centre. The two draw differently and end differently; each repeats itself for the same seed. prefer: "faiss" or
    "torch". Raises ``UserError`` where there are fewer rows than clusters, or embeddings are not finite.
    """
    vectors = as_vectors(vectors, "query")
    if not 1 <= count <= len(vectors):
        raise UserError(f"{len(vectors)} embeddings cannot make {count} clusters; give 1 to {len(vectors)}.")
    seed %= 2**31  # faiss takes no more
    if (prefer or backend()) == "torch":
        return _lloyd(vectors, count, seed, iterations)
    # min_points_per_centroid only silences a warning on stderr, which small test sets would always print.
    settings = {"niter": iterations, "seed": seed, "min_points_per_centroid": 1}
    machine = load_faiss().Kmeans(vectors.shape[1], count, **settings)
    machine.train(vectors.numpy())
    return _assign(vectors, torch.from_numpy(machine.centroids), "faiss")[0]


def _assign(vectors: Tensor, centres: Tensor, prefer: str) -> tuple[Tensor, Tensor]:
    """(N,) the nearest centre of every row, and the distance from it."""
    found = find_neighbours(
        vectors,
        centres,
        query_labels=torch.zeros(len(vectors)),
        gallery_labels=torch.zeros(len(centres)),
        prefer=prefer,
    )
    return found.indices[:, 0], found.distances[:, 0]


def _lloyd(vectors: Tensor, count: int, seed: int, iterations: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    centres = vectors[torch.randperm(len(vectors), generator=draw)[:count]]
    clusters, far = _assign(vectors, centres, "torch")
    for _ in range(iterations):
        sizes = clusters.bincount(minlength=count)
        centres = torch.zeros_like(centres).index_add_(0, clusters, vectors) / sizes.clamp(min=1)[:, None]
        lost = (sizes == 0).nonzero()[:, 0]
        centres[lost] = vectors[far.topk(len(lost)).indices]
        before = clusters
        clusters, far = _assign(vectors, centres, "torch")
        if torch.equal(before, clusters):
            break
    return clusters


def clustering_nmi(vectors: Tensor, labels: Tensor, *, seed: int = 0, prefer: str | None = None) -> float:
    """NMI between the classes of (N, D) embeddings and as many k-means clusters; see the two functions above."""
    labels = as_integers(labels)
    clusters = kmeans(vectors, len(labels.unique()), seed=seed, prefer=prefer)
    return normalised_mutual_information(labels, clusters)
