"""What is said of a student beside another network, against counting one query at a time."""

import json

import pytest
import torch

from metric_kd.distances import unit_rows
from metric_kd.errors import UserError
from metric_kd.evaluation.agreement import share_of, shared_counts
from metric_kd.evaluation.analysis import linear_cka
from metric_kd.evaluation.comparing import MERGED, Sides, compare, merge
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.evidence import effective_rank, uniformity
from metric_kd.evaluation.metrics import hits_at_k, recall_at_k
from metric_kd.evaluation.search import find_neighbours
from metric_kd.evaluation.statistics import merged

NAMES = ("ant", "bee", "cat", "dog")


def embeddings(width, seed, count=40):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    vectors = torch.randn(4, width, generator=draw)[labels] + torch.randn(count, width, generator=draw)
    return Embeddings(vectors, labels, torch.arange(count))


def nearest(side, asked, offered, k):
    """Rows of the k nearest, by distances between single vectors."""
    gaps = (side.vectors[:, None] - side.vectors[None]).double().norm(dim=2)
    return {q: sorted((g for g in offered if g != q), key=lambda g: float(gaps[q, g]))[:k] for q in asked}


@pytest.mark.parametrize("split", [False, True])
def test_counts_by_query(split):
    ours, theirs = embeddings(3, 0), embeddings(6, 1)
    query = gallery = None
    asked = offered = range(40)
    if split:
        query = (torch.arange(40) % 3 == 0).numpy()
        gallery = ~query
        asked, offered = (list(m.nonzero()[0]) for m in (query, gallery))
    report = compare(Sides(ours, theirs, query, gallery), NAMES, k=4)
    json.dumps(report)
    near = {name: nearest(side, asked, offered, 4) for name, side in (("student", ours), ("teacher", theirs))}
    labels = ours.labels.tolist()
    hit = {name: {q: labels[rows[0]] == labels[q] for q, rows in found.items()} for name, found in near.items()}
    for name, values in hit.items():
        assert report["recall@1"][name]["mean"] == pytest.approx(sum(values.values()) / len(values))
        low, high = report["recall@1"][name]["low"], report["recall@1"][name]["high"]
        assert low < report["recall@1"][name]["mean"] < high
    gap = sum(hit["student"][q] - hit["teacher"][q] for q in asked) / len(asked)
    assert report["difference"]["mean"] == pytest.approx(gap) and 0 < report["difference"]["p"] <= 1
    overlap = sum(len({*near["student"][q]} & {*near["teacher"][q]}) / 4 for q in asked) / len(asked)
    assert report["agreement"]["overlap"]["mean"] == pytest.approx(overlap)
    for label, name in enumerate(NAMES):
        own = [q for q in asked if labels[q] == label]
        assert report["classes"][name]["queries"] == len(own)
        for side in ("student", "teacher"):
            assert report["classes"][name][side] == pytest.approx(sum(hit[side][q] for q in own) / len(own))
        shared = sum(len({*near["student"][q]} & {*near["teacher"][q]}) / 4 for q in own) / len(own)
        assert report["classes"][name]["agreement"]["overlap"] == pytest.approx(shared)
        alone = [torch.stack([side.vectors[i] for i in range(40) if labels[i] == label]) for side in (ours, theirs)]
        assert report["classes"][name]["agreement"]["cka"] == pytest.approx(float(linear_cka(*alone)))
        shape = report["classes"][name]["geometry"]
        assert shape["student"]["effective_rank"] == pytest.approx(effective_rank(alone[0]))
        assert shape["teacher"]["uniformity"] == pytest.approx(uniformity(alone[1]))
        gaps = torch.pdist(unit_rows(alone[1])).square().mean()
        assert shape["teacher"]["alignment"] == pytest.approx(float(gaps), rel=1e-5)
    assert report["geometry"]["student"]["dimensions"] == 3 and report["queries"] == len(asked)
    assert 1 < report["geometry"]["student"]["effective_rank"] <= 3


def test_a_network_beside_itself():
    side = embeddings(5, 0)
    turned = side._replace(vectors=3 * side.vectors @ torch.linalg.qr(torch.randn(5, 5))[0])
    report = compare(Sides(turned, side), NAMES)
    assert report["difference"]["mean"] == 0 and report["difference"]["p"] == 1
    assert report["agreement"]["overlap"]["mean"] == 1 and report["agreement"]["cka"] == pytest.approx(1)
    assert report["agreement"]["rank_biased_overlap"]["mean"] == pytest.approx(1)


def test_a_class_of_one_image_has_no_pairs():
    side = embeddings(5, 0)
    labels = side.labels.clone()
    labels[labels == 3] = 2
    labels[0] = 3
    side = side._replace(labels=labels)
    alone = compare(Sides(side, side), NAMES)["classes"]["dog"]
    assert alone["queries"] == 1 and alone["agreement"]["cka"] is None
    assert alone["geometry"]["student"] == {"effective_rank": 0, "dimensions": 5, "alignment": None, "uniformity": None}


def test_what_cannot_be_compared():
    side = embeddings(5, 0)
    with pytest.raises(UserError, match="other images"):
        compare(Sides(side, side._replace(indices=side.indices.flip(0))), NAMES)
    with pytest.raises(UserError, match="larger than the gallery"):
        compare(Sides(side, side), NAMES, k=40)


def test_classes_of_one_image_have_no_alignment():
    side = embeddings(5, 0, count=4)
    report = compare(Sides(side, side), NAMES, k=2)
    assert report["geometry"]["student"]["alignment"] is None and report["recall@1"]["student"]["mean"] == 0
    json.dumps(report, allow_nan=False)


def test_seeds_are_merged_figure_by_figure():
    teacher = embeddings(6, 9)
    reports = [compare(Sides(embeddings(3, seed), teacher), NAMES) for seed in range(3)]
    together = merge(reports)
    assert set(together) == set(MERGED)
    for name, found in (
        ("recall@1", [r["recall@1"]["student"]["mean"] for r in reports]),
        ("difference", [r["difference"]["mean"] for r in reports]),
        ("agreement.cka", [r["agreement"]["cka"] for r in reports]),
        ("agreement.overlap", [r["agreement"]["overlap"]["mean"] for r in reports]),
        ("geometry.hubness", [r["geometry"]["student"]["hubness"] for r in reports]),
    ):
        expected = merged(found)
        assert together[name] == pytest.approx(expected._asdict())
    alone = merge(reports[:1])["recall@1"]
    assert alone["low"] is None and alone["mean"] == reports[0]["recall@1"]["student"]["mean"]


def test_hits_are_what_recall_counts():
    side = embeddings(3, 4)
    near = find_neighbours(side.vectors, k=7, query_labels=side.labels)
    for k in (1, 3, 7):
        assert float(hits_at_k(near, k).mean()) == pytest.approx(recall_at_k(near, [k])[k])
    with pytest.raises(UserError, match="were searched"):
        hits_at_k(near, 8)


def test_shared_neighbours_in_parts(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.stack([torch.randperm(20, generator=draw)[:5] for _ in range(9)]) for _ in range(2))
    counts = [len({*a.tolist()} & {*b.tolist()}) for a, b in zip(one, other, strict=True)]
    monkeypatch.setattr("metric_kd.evaluation.agreement.AT_ONCE", 50)
    assert shared_counts(one, other).tolist() == counts
    assert share_of(one, other) == pytest.approx(sum(counts) / 45)
