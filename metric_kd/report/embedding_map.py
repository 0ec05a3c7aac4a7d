"""Maps of embeddings on a plane: PCA, and where their packages are installed t-SNE and UMAP."""

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from torch import Tensor

from metric_kd.errors import UserError
from metric_kd.report.curves import LETTERS, WIDTH, plain
from metric_kd.report.marks import MARKERS, mark
from metric_kd.report.pictures import Picture, chart

CLASSES, EACH = len(MARKERS), 40
"""Classes of a map, and images of each, at most."""
NAMES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
"""Map -> its name for people."""
PACKAGES = {"tsne": ("sklearn", "scikit-learn"), "umap": ("umap", "umap-learn")}
"""Map -> (module, package)."""
NEIGHBOURS = 15
"""Of an image, which UMAP keeps; twice as many is the perplexity of t-SNE."""


def require(kind: str) -> None:
    """Raise ``UserError`` where the package of a map is not installed."""
    if kind in PACKAGES and find_spec(PACKAGES[kind][0]) is None:
        package = PACKAGES[kind][1]
        raise UserError(f"--map {kind}: {NAMES[kind]} needs {package}; pip install {package}, or take --map pca.")


def shown(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Rows of the images on a map: a dozen classes, evenly spread over their numbers, and up to ``EACH`` images of each."""
    classes, counts = np.unique(labels, return_counts=True)
    classes = classes[counts > 1] if (counts > 1).any() else classes
    classes = classes[np.unique(np.linspace(0, len(classes) - 1, min(CLASSES, len(classes))).round().astype(int))]
    draw = np.random.default_rng(seed)
    rows = [np.sort(draw.permutation(np.flatnonzero(labels == name))[:EACH]) for name in classes]
    return np.concatenate(rows)


def pca(vectors: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """((N, 2) places, shares of the variance) along the two directions of largest variance of (N, D) vectors.

    The sign of a direction is free: it is chosen so that its largest entry is positive.
    """
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])
    places = centred @ (directions * np.where(signs == 0, 1, signs)[:, None])[:2].T
    share = np.square(values) / max(np.square(values).sum(), 1e-300)
    missing = 2 - places.shape[1]
    return np.pad(places, ((0, 0), (0, max(missing, 0)))), tuple(np.pad(share, (0, 2))[:2].tolist())  # type: ignore[return-value]


def places_of(vectors: np.ndarray, kind: str) -> tuple[np.ndarray, tuple[str, str], str]:
    """((N, 2), names of the axes, what to know when reading) of a map; ``UserError`` where its package is missing."""
    require(kind)
    if kind == "pca":
        places, share = pca(vectors)
        names = tuple(f"direction {k} ({100 * part:.0f}% of the variance)" for k, part in enumerate(share, 1))
        return places, names, f"PCA: the two directions that show {100 * sum(share):.0f}% of the variance"  # type: ignore[return-value]
    if kind == "tsne":
        from sklearn.manifold import TSNE

        perplexity = float(min(2 * NEIGHBOURS, max(1, (len(vectors) - 1) // 3)))
        found = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)
        return found, ("", ""), "t-SNE: who is near counts; distances between groups and their sizes mean nothing"
    from umap import UMAP

    near = min(NEIGHBOURS, len(vectors) - 1)
    found = UMAP(n_components=2, n_neighbors=near, random_state=0, n_jobs=1).fit_transform(vectors)
    return np.asarray(found), ("", ""), "UMAP: who is near counts; distances between groups mean little"


def embedding_map(title: str, vectors: Tensor, labels: Tensor, class_names: Sequence[str], kind: str) -> Picture:
    """A network's map of a dozen classes; each has a colour and a marker. vectors: (N, D); labels: (N,)."""
    from matplotlib.figure import Figure

    rows = shown(labels.numpy())
    drawn = labels.numpy()[rows]
    places, names, reading = places_of(vectors.numpy()[rows], kind)
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    axes = figure.add_subplot()
    classes = np.unique(drawn)
    for place, label in enumerate(classes):
        colour, marker = mark(place)
        points = places[drawn == label]
        x, y = points.T
        axes.scatter(x, y, s=34, marker=marker, color=colour, alpha=0.8, lw=0, label=plain(class_names[label]))
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(names[0], fontsize=LETTERS)
    axes.set_ylabel(names[1], fontsize=LETTERS)
    axes.set_title(plain(title), fontsize=LETTERS, loc="left", fontweight="bold")
    figure.legend(loc="outside lower left", frameon=False, fontsize=LETTERS - 1, ncols=3, handletextpad=0.2)
    listed = ", ".join(class_names[label] for label in classes)
    return chart(
        figure,
        f"Map of the embeddings of {title}, {len(rows)} images of the classes {listed}. {reading}.",
        f"{title}. {reading}.",
    )
