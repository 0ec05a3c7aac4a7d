"""MAP@R, R-precision, precision@K and NMI equal slow oracles and pytorch-metric-learning's AccuracyCalculator."""

import math
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

from metric_kd.errors import UserError
from metric_kd.evaluation import metrics, retrieval
from metric_kd.evaluation.clustering import clustering_nmi, kmeans, normalised_mutual_information
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.metrics import (
    map_at_r,
    neighbour_metric,
    precision_at_k,
    r_precision,
    recall_at_k,
    relevant_counts,
    titles,
)
from metric_kd.evaluation.retrieval import check_metrics, evaluate_retrieval
from metric_kd.evaluation.search import find_neighbours
from metric_kd.types import Neighbours

NAMES = ["map@r", "r_precision", "precision@1", "precision@7"]


def clustered(count=150, classes=9, noise=1.5, seed=0, dimensions=6):
    """Classes of very different sizes."""
    draw = np.random.default_rng(seed)
    share = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    labels = np.concatenate([np.arange(classes).repeat(2), draw.choice(classes, count - 2 * classes, p=share)])
    draw.shuffle(labels)
    x = draw.standard_normal((classes, dimensions))[labels] + noise * draw.standard_normal((count, dimensions))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels)


def oracle(x, labels, query=None, gallery=None):
    """{name: mean over queries} of plain loops; queries that have nothing to find are left out."""
    x, labels = np.asarray(x, np.float64), np.asarray(labels)
    everyone = np.arange(len(x))
    found = {name: [] for name in NAMES}
    for q in everyone if query is None else everyone[query]:
        others = [g for g in (everyone if gallery is None else everyone[gallery]) if g != q]
        others.sort(key=lambda g: (((x[g] - x[q]) ** 2).sum(), g))
        right = [labels[g] == labels[q] for g in others]
        r = sum(right)
        if r == 0:
            continue
        found["map@r"].append(sum(sum(right[:j]) / j for j in range(1, r + 1) if right[j - 1]) / r)
        found["r_precision"].append(sum(right[:r]) / r)
        for k in (1, 7):
            found[f"precision@{k}"].append(sum(right[:k]) / k)
    return {name: float(np.mean(values)) for name, values in found.items()}


def masks(count, seed=0):
    draw = np.random.default_rng(seed)
    query = draw.random(count) < 0.5
    return query, ~query | (draw.random(count) < 0.3)


@pytest.mark.parametrize("seed", range(3))
def test_equal_one_query_at_a_time(seed):
    x, labels = clustered(seed=seed)
    values, _ = evaluate_retrieval(Embeddings(x, labels, torch.arange(len(x))), [1], metrics=NAMES)
    expected = oracle(x, labels)
    assert list(values) == ["recall@1", *NAMES]
    assert {name: values[name] for name in NAMES} == pytest.approx(expected, abs=1e-12)
    assert 0.05 < expected["map@r"] < expected["r_precision"] < expected["precision@1"] < 1
    assert values["precision@1"] == values["recall@1"]  # as every class has two images


@pytest.mark.parametrize("given", ["both", "query", "gallery"])
def test_query_and_gallery(given):
    x, labels = clustered()
    query, gallery = masks(len(x))
    assert (query & gallery).any() and (query & ~gallery).any()
    query, gallery = (query if given != "gallery" else None), (gallery if given != "query" else None)
    data = Embeddings(x, labels, torch.arange(len(x)))
    values, found = evaluate_retrieval(data, [1, 4], query=query, gallery=gallery, metrics=NAMES)
    assert {name: values[name] for name in NAMES} == pytest.approx(oracle(x, labels, query, gallery), abs=1e-12)
    plain, same = evaluate_retrieval(data, [1, 4], query=query, gallery=gallery)
    assert plain == {k: v for k, v in values.items() if k in plain}
    assert torch.equal(found.indices, same.indices)
    torch.testing.assert_close(found.distances, same.distances)  # no bits: other blocks are summed
    assert torch.equal(found.gallery_labels, same.gallery_labels)


def test_parts_of_the_queries_change_nothing(monkeypatch):
    x, labels = clustered()
    query, gallery = masks(len(x))
    data = Embeddings(x, labels, torch.arange(len(x)))
    for split in ({}, {"query": query, "gallery": gallery}):
        whole, near = evaluate_retrieval(data, [1, 4], metrics=NAMES, **split)
        with monkeypatch.context() as patch:
            patch.setattr(retrieval, "HELD", 300)
            patch.setattr(metrics, "BLOCK", 100)
            parts, again = evaluate_retrieval(data, [1, 4], metrics=NAMES, **split)
        assert parts == pytest.approx(whole, abs=1e-12)
        assert torch.equal(near.indices, again.indices)
        torch.testing.assert_close(near.distances, again.distances)  # no bits: other blocks are summed


SWAPPED = 2e-4
"""What a few neighbours do whose order is that of rounding in float32: that library takes distances in another form."""


@pytest.mark.parametrize("split", [False, True])
def test_equal_pytorch_metric_learning(split):
    pytest.importorskip("faiss")
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    x, labels = clustered(count=240, classes=12)
    labels = labels.where(torch.arange(len(x)) != 3, 99)  # a class with one image
    query = torch.arange(len(x)) < 140  # that library's gallery begins with the queries
    include = ("mean_average_precision_at_r", "r_precision", "precision_at_1", "NMI")
    calculator = calculators.AccuracyCalculator(include=include, k="max_bin_count", device=torch.device("cpu"))
    if split:
        theirs = calculator.get_accuracy(x[query], labels[query], x, labels, ref_includes_query=True)
    else:
        theirs = calculator.get_accuracy(x, labels)
    names = ["map@r", "r_precision", "precision@1", "nmi"]
    with pytest.warns(UserWarning, match="1 of .* queries have no other image"):
        ours, _ = evaluate_retrieval(
            Embeddings(x, labels, torch.arange(len(x))),
            [1],
            query=query.numpy() if split else None,
            metrics=names,
            seed=1234,  # faiss' default, which theirs uses
        )
    assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in include], abs=SWAPPED)


def test_disjoint_query_and_gallery_equal_pytorch_metric_learning():
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    x, labels = clustered(count=200)
    query = np.arange(200) < 80
    include = ("mean_average_precision_at_r", "r_precision", "precision_at_1")
    calculator = calculators.AccuracyCalculator(include=include, k="max_bin_count", device=torch.device("cpu"))
    theirs = calculator.get_accuracy(x[query], labels[query], x[~query], labels[~query])
    data = Embeddings(x, labels, torch.arange(200))
    ours, _ = evaluate_retrieval(data, [1], query=query, gallery=~query, metrics=NAMES)
    assert [ours[name] for name in NAMES[:3]] == pytest.approx([theirs[name] for name in include], abs=SWAPPED)


def test_by_hand():
    """R = 3, of which the 1st, 3rd and 5th neighbours are right: (1/1 + 2/3) / 3, 2/3, and 2/4 at K = 4."""
    found = Neighbours(
        torch.tensor([[1, 4, 2, 5, 3]]), torch.zeros(1, 5), torch.tensor([7]), torch.tensor([7] * 4 + [0] * 2)
    )
    r = torch.tensor([3])
    assert map_at_r(found, r) == pytest.approx((1 + 2 / 3) / 3)
    assert r_precision(found, r) == pytest.approx(2 / 3)
    assert precision_at_k(found, r, 4) == pytest.approx(2 / 4)


def test_a_class_of_one_image_is_left_out_with_a_warning():
    x = torch.tensor([[0.0], [0.1], [5.0]])
    data = Embeddings(x, torch.tensor([0, 0, 1]), torch.arange(3))
    with pytest.warns(UserWarning, match="1 of 3 queries have no other image of their class.*map@r, precision@1"):
        values, _ = evaluate_retrieval(data, [1], metrics=["map@r", "precision@1"])
    assert values == {"recall@1": 2 / 3, "map@r": 1.0, "precision@1": 1.0}
    alone = Embeddings(x, torch.arange(3), torch.arange(3))
    with pytest.raises(UserError, match="no query has another image of its class"):
        evaluate_retrieval(alone, [1], metrics=["r_precision"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate_retrieval(alone, [1], metrics=["nmi"])[0] == {"recall@1": 0.0, "nmi": 1.0}


def test_missing_neighbours_are_wrong():
    found = Neighbours(
        torch.tensor([[1, -1]]), torch.tensor([[0.1, torch.inf]]), torch.tensor([7]), torch.tensor([7, 7])
    )
    assert r_precision(found, torch.tensor([2])) == map_at_r(found, torch.tensor([2])) == 0.5


def test_relevant_counts():
    labels = torch.tensor([5, 5, 5, 2, 9])
    assert relevant_counts(labels).tolist() == [2, 2, 2, 0, 0]
    assert relevant_counts(labels, torch.tensor([5, 2, 2])).tolist() == [1, 1, 1, 2, 0]
    ids = relevant_counts(labels, torch.tensor([5, 2, 2]), torch.arange(5), torch.tensor([0, 3, 8]))
    assert ids.tolist() == [0, 1, 1, 1, 0]


def test_too_few_neighbours_are_refused():
    x, labels = clustered()
    found = find_neighbours(x, k=3, query_labels=labels)
    r = relevant_counts(labels)
    most = int(r.max())
    for function, name in ((map_at_r, "MAP@R"), (r_precision, "R-precision")):
        with pytest.raises(UserError, match=f"{name} needs {most} neighbours and 3 were searched"):
            function(found, r)
    with pytest.raises(UserError, match="precision@4 needs 4"):
        precision_at_k(found, r, 4)
    assert precision_at_k(found, r, 1) == recall_at_k(found, [1])[1]


@pytest.mark.parametrize(
    "name", ["map", "precision@0", "precision@", "precision@x", "precision@-1", "precision@1.5", "NMI"]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(UserError, match=f"unknown metric '{name}'"):
        titles([name])
    with pytest.raises(UserError, match="unknown metric"):
        evaluate_retrieval(Embeddings(torch.eye(3), torch.zeros(3), torch.arange(3)), [1], metrics=[name])


def test_names_and_titles():
    assert titles(["nmi", "map@r", "precision@12"]) == {"nmi": "NMI", "map@r": "MAP@R", "precision@12": "Precision@12"}
    assert neighbour_metric("precision@12").wanted(torch.tensor([3])) == 12


def test_check_metrics_reads_the_labels_alone():
    labels = np.array([0, 0, 1, 2])
    check_metrics(["map@r", "nmi", "precision@3"], labels)
    check_metrics([], np.arange(3))
    check_metrics(["nmi"], np.arange(3))
    with pytest.raises(UserError, match="K = 4 is larger than the gallery"):
        check_metrics(["precision@4"], labels)
    with pytest.raises(UserError, match="which r_precision needs"):
        check_metrics(["r_precision"], np.arange(3))
    with pytest.raises(UserError, match="which map@r needs"):
        check_metrics(["map@r"], labels, np.array([0, 0, 1, 1], bool), np.array([1, 1, 0, 0], bool))


def plain_nmi(labels, clusters):
    n = len(labels)
    both, of_class, of_group = Counter(zip(labels, clusters, strict=True)), Counter(labels), Counter(clusters)
    information = sum(c / n * math.log(n * c / (of_class[i] * of_group[j])) for (i, j), c in both.items())
    entropy = [-sum(c / n * math.log(c / n) for c in counts.values()) for counts in (of_class, of_group)]
    return 2 * information / sum(entropy)


@pytest.mark.parametrize("seed", range(3))
def test_nmi_equals_the_plain_sums(seed):
    draw = np.random.default_rng(seed)
    labels = draw.integers(-3, 20, 300)
    clusters = np.where(draw.random(300) < 0.6, labels, draw.integers(0, 9, 300))
    ours = normalised_mutual_information(torch.from_numpy(labels), torch.from_numpy(clusters))
    assert ours == pytest.approx(plain_nmi(labels.tolist(), clusters.tolist()), abs=1e-12)
    assert 0.2 < ours < 0.9
    sklearn = pytest.importorskip("sklearn.metrics")
    assert ours == pytest.approx(sklearn.normalized_mutual_info_score(labels, clusters), abs=1e-9)


def test_nmi_at_its_ends():
    labels = torch.tensor([0, 0, 1, 1])
    assert normalised_mutual_information(labels, torch.tensor([7, 7, -2, -2])) == pytest.approx(1)
    assert normalised_mutual_information(labels, torch.tensor([0, 1, 0, 1])) == pytest.approx(0)
    assert normalised_mutual_information(labels, torch.zeros(4)) == 0
    assert normalised_mutual_information(torch.zeros(4), torch.ones(4)) == 1
    for other in (torch.zeros(3), torch.zeros(0), torch.zeros(4, 1)):
        with pytest.raises(UserError, match="same images"):
            normalised_mutual_information(labels, other)


def test_nmi_with_as_many_clusters_as_images_needs_no_matrix_of_both():
    """50,000 x 50,000 counts would be 19 GiB."""
    labels = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    assert normalised_mutual_information(labels, labels.flip(0)) == pytest.approx(1)


@pytest.mark.parametrize("prefer", ["faiss", "torch"])
def test_kmeans_finds_blobs_and_repeats_itself(prefer, capfd):
    if prefer == "faiss":
        pytest.importorskip("faiss")
    labels = torch.arange(200) % 3
    x = 5 * torch.eye(3)[labels] + 0.1 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assert max(clustering_nmi(x, labels, seed=seed, prefer=prefer) for seed in range(12)) == pytest.approx(1)
    first, again = (kmeans(x, 5, seed=3, prefer=prefer) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (200,) and first.min() >= 0 and first.max() < 5
    noisy, _ = clustered(count=200, classes=5, noise=3)
    assert not torch.equal(kmeans(noisy, 5, seed=0, prefer=prefer), kmeans(noisy, 5, seed=1, prefer=prefer))
    assert "WARNING" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("prefer", ["faiss", "torch"])
def test_kmeans_ends_where_no_centre_moves(prefer):
    """Every row is in the cluster whose mean is nearest."""
    if prefer == "faiss":
        pytest.importorskip("faiss")
    x, _ = clustered(count=120, classes=4, noise=0.7)
    found = kmeans(x, 4, iterations=100, prefer=prefer)
    centres = torch.stack([x[found == c].mean(0) for c in range(4)])
    assert torch.equal(torch.cdist(x.double(), centres.double()).argmin(1), found)


def test_kmeans_of_copies_fills_lost_clusters():
    x = torch.cat([torch.zeros(50, 2), torch.eye(2), -torch.eye(2)])
    assert len(kmeans(x, 5, prefer="torch").unique()) == 5
    assert len(kmeans(torch.zeros(6, 2), 3, prefer="torch")) == 6
    assert kmeans(x, 1, prefer="torch").eq(0).all()


def test_kmeans_refuses_what_cannot_be():
    for count in (0, 4):
        with pytest.raises(UserError, match="cannot make"):
            kmeans(torch.eye(3), count)
    with pytest.raises(UserError, match="not finite"):
        kmeans(torch.full((3, 2), torch.nan), 2)
