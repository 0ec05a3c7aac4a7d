"""Rank-k and mAP across cameras, against one query at a time in plain Python."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metric_kd.errors import UserError
from metric_kd.evaluation import reidentification
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.reidentification import reidentify
from metric_kd.evaluation.retrieval import evaluate_retrieval

JUNK, DISTRACTOR = -1, 0


def one_query_at_a_time(query, gallery, ranks=(1, 5, 10)):
    """Both as lists of (vector, person, camera), junk included. Follows the protocol as it is told, image by image."""
    firsts, precisions, matlab, left_out = [], [], [], 0
    for vector, person, camera in query:
        seen = []
        for row, (other, whose, where) in enumerate(gallery):
            if whose == JUNK or (whose == person and where == camera):
                continue
            seen.append((sum((a - b) ** 2 for a, b in zip(vector, other, strict=True)), row, whose == person))
        right = [hit for _, _, hit in sorted(seen)]
        matches = sum(right)
        if matches == 0:
            left_out += 1
            firsts.append(-1)
            continue
        firsts.append(right.index(True))
        precisions.append(sum(sum(right[: k + 1]) / (k + 1) for k, hit in enumerate(right) if hit) / matches)
        area, old_recall, old_precision = 0.0, 0.0, 1.0
        for k in range(len(right)):
            recall, precision = sum(right[: k + 1]) / matches, sum(right[: k + 1]) / (k + 1)
            area += (recall - old_recall) * (old_precision + precision) / 2
            old_recall, old_precision = recall, precision
        matlab.append(area)
    counted = [first for first in firsts if first >= 0]
    metrics = {f"rank{k}": sum(first < k for first in counted) / len(counted) for k in ranks}
    mean = sum(precisions) / len(precisions)
    return metrics | {"mAP": mean}, sum(matlab) / len(matlab), firsts, left_out


def street(seed, queries=14, images=70, whole_numbers=False):
    """(query, gallery) with junk, distractors and several cameras; whole numbers make many equal distances."""
    draw = np.random.default_rng(seed)
    people, cameras = int(draw.integers(3, 12)), int(draw.integers(2, 7))
    size = int(draw.integers(1, 9))
    centres = draw.standard_normal((people + 1, size)) * draw.choice([0.3, 1.0, 3.0])

    def crops(count, lowest):
        persons = draw.integers(lowest, people + 1, count)
        vectors = draw.standard_normal((count, size)) + centres[persons.clip(0)]
        vectors = np.round(vectors) if whole_numbers else vectors.astype(np.float32)
        return [(v.tolist(), int(p), int(draw.integers(1, cameras + 1))) for v, p in zip(vectors, persons, strict=True)]

    return crops(queries, 1), crops(images, JUNK)


def tensors(query, gallery, keep_junk=False):
    gallery = [crop for crop in gallery if keep_junk or crop[1] != JUNK]
    (q, ql, qc), (g, gl, gc) = zip(*query, strict=True), zip(*gallery, strict=True)
    columns = {"query_labels": ql, "gallery_labels": gl, "query_cameras": qc, "gallery_cameras": gc}
    return (torch.tensor(q), torch.tensor(g)), {name: torch.tensor(column) for name, column in columns.items()}


@pytest.mark.parametrize("whole_numbers", [False, True], ids=["apart", "with ties"])
@pytest.mark.parametrize("seed", range(20))
def test_equals_the_oracle(seed, whole_numbers):
    query, gallery = street(seed, whole_numbers=whole_numbers)
    metrics, matlab, firsts, left_out = one_query_at_a_time(query, gallery)
    sides, columns = tensors(query, gallery)
    found = reidentify(*sides, **columns)
    assert found.metrics == pytest.approx(metrics, abs=1e-12) and list(found.metrics) == [
        "rank1",
        "rank5",
        "rank10",
        "mAP",
    ]
    assert found.first.tolist() == firsts and found.left_out == left_out
    trapezoid = reidentify(*sides, **columns, interpolation="trapezoid")
    assert trapezoid.metrics["mAP"] == pytest.approx(matlab, abs=1e-12)
    assert trapezoid.metrics["mAP"] <= found.metrics["mAP"] and trapezoid.metrics["rank1"] == metrics["rank1"]


def test_the_generated_streets_have_everything():
    streets = [street(seed) for seed in range(20)]
    assert any(one_query_at_a_time(*each)[3] for each in streets), "queries without a match"
    for query, gallery in streets:
        persons = {person for _, person, _ in gallery}
        assert {JUNK, DISTRACTOR} < persons and len({camera for _, _, camera in gallery}) > 1
        assert any(q[1:] == g[1:] for q in query for g in gallery), "images by the query's own camera"


@pytest.mark.parametrize("whole_numbers", [False, True])
def test_blocks_of_any_size_give_the_same(whole_numbers, monkeypatch):
    sides, columns = tensors(*street(3, queries=40, images=90, whole_numbers=whole_numbers))
    whole = reidentify(*sides, **columns)
    for block in (1, 7, 39, 1000):
        found = reidentify(*sides, **columns, block=block)
        assert found.metrics == whole.metrics and torch.equal(found.first, whole.first)
        assert torch.equal(found.average_precision.nan_to_num(-1), whole.average_precision.nan_to_num(-1))
    monkeypatch.setattr(reidentification, "TILE", 10)  # less than one query needs
    assert reidentify(*sides, **columns).metrics == whole.metrics


def test_a_worked_example():
    """One query; ranked: distractor, match, own camera (not seen), other person, match."""
    gallery = torch.tensor([[1.0], [2.0], [2.5], [3.0], [4.0]])
    found = reidentify(
        torch.zeros(1, 1),
        gallery,
        query_labels=torch.tensor([7]),
        gallery_labels=torch.tensor([0, 7, 7, 8, 7]),
        query_cameras=torch.tensor([1]),
        gallery_cameras=torch.tensor([1, 2, 1, 1, 3]),
        ranks=[1, 2],
    )
    assert found.metrics == {"rank1": 0.0, "rank2": 1.0, "mAP": pytest.approx((1 / 2 + 2 / 4) / 2)}
    assert found.first.tolist() == [1] and found.left_out == 0


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("size", [3, 100])
def test_equal_distances_go_to_the_lower_row(size, offset):
    """Copies at distance zero, on a sphere around the query and far from the origin; torch's sums would tell them apart."""
    draw = torch.Generator().manual_seed(0)
    point = torch.randn(size, generator=draw)
    flips = torch.where(torch.rand(60, size, generator=draw) < 0.5, -1.0, 1.0)
    for gallery, query in ((point * flips, torch.zeros(1, size)), (point.expand(60, size), point[None])):
        query, gallery = query + offset, (gallery + offset).repeat(2, 1)
        if offset:  # the sum rounds, so that only exact copies tie
            gallery = gallery[:1].expand(120, size)
        for place in (0, 17, 119):
            labels = torch.zeros(120, dtype=torch.int64)
            labels[place] = 1
            found = reidentify(
                query,
                gallery,
                query_labels=torch.tensor([1]),
                gallery_labels=labels,
                query_cameras=torch.tensor([1]),
                gallery_cameras=torch.full((120,), 2),
            )
            assert found.first.tolist() == [place]


def test_close_neighbours_far_from_the_origin_are_told_apart():
    gallery = torch.tensor([[1000.0, 2.0**-9], [1000.0, 2.0**-10], [-1000.0, 0.0]])
    found = reidentify(
        torch.tensor([[1000.0, 0.0]]),
        gallery,
        query_labels=torch.tensor([1]),
        gallery_labels=torch.tensor([0, 1, 0]),
        query_cameras=torch.tensor([1]),
        gallery_cameras=torch.tensor([2, 2, 2]),
    )
    assert found.first.tolist() == [0]


class Largest(TorchDispatchMode):
    """The most elements that any result of an operation had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
        return results


def test_memory_is_that_of_the_tile_and_the_inputs(monkeypatch):
    sides, columns = tensors(*street(1, queries=150, images=200))
    inputs = max(side.numel() for side in sides)
    monkeypatch.setattr(reidentification, "TILE", 1000)
    with Largest() as largest:
        reidentify(*sides, **columns)
    assert 500 < largest.elements <= max(1000, inputs)
    monkeypatch.undo()
    with Largest() as largest:
        reidentify(*sides, **columns)
    assert largest.elements > 2 * max(1000, inputs), "the first bound would hold without blocks"


def test_what_cannot_be_scored_is_refused():
    sides, columns = tensors(*street(0))
    alone = columns | {"gallery_labels": torch.full_like(columns["gallery_labels"], 99)}
    with pytest.raises(UserError, match="no query has an image of its person by another camera"):
        reidentify(*sides, **alone)
    one_camera = {k: torch.ones_like(v) if "cameras" in k else v for k, v in columns.items()}
    with pytest.raises(UserError, match="no query has an image"):
        reidentify(*sides, **one_camera)
    with pytest.raises(UserError, match="query embeddings are not finite"):
        reidentify(sides[0] * torch.nan, sides[1], **columns)
    with pytest.raises(UserError, match="dimensions"):
        reidentify(sides[0][:, :1].repeat(1, 30), sides[1], **columns)
    with pytest.raises(ValueError, match="one entry per embedding"):
        reidentify(*sides, **(columns | {"query_cameras": torch.ones(3)}))
    for ranks in ([], [0, 5]):
        with pytest.raises(UserError, match="ranks"):
            reidentify(*sides, **columns, ranks=ranks)
    with pytest.raises(UserError, match="did you mean 'trapezoid'"):
        reidentify(*sides, **columns, interpolation="trapez")


# ---- through evaluate_retrieval


def whole(query, gallery):
    """(Embeddings in another order, columns of the data set); junk is in neither mask."""
    crops = query + gallery
    rows = torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))
    vectors, labels, cameras = (torch.tensor(column) for column in zip(*crops, strict=True))
    asks = np.arange(len(crops)) < len(query)
    offered = ~asks & (labels.numpy() != JUNK)
    return Embeddings(vectors[rows], labels[rows], rows), {
        "query": asks,
        "gallery": offered,
        "cameras": cameras.numpy(),
    }


def test_with_cameras_the_evaluation_scores_both_ways():
    query, gallery = street(5)
    embeddings, columns = whole(query, gallery)
    metrics, neighbours = evaluate_retrieval(embeddings, [1, 4], **columns)
    expected, _, _, left_out = one_query_at_a_time(query, gallery)
    assert left_out == 0
    assert list(metrics) == ["recall@1", "recall@4", "rank1", "rank5", "rank10", "mAP"]
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    without, same = evaluate_retrieval(embeddings, [1, 4], query=columns["query"], gallery=columns["gallery"])
    assert without == {key: metrics[key] for key in ("recall@1", "recall@4")}
    assert torch.equal(neighbours.indices, same.indices)
    with pytest.raises(UserError, match="camera column has 3 entries"):
        evaluate_retrieval(embeddings, [1], **(columns | {"cameras": np.ones(3)}))


def test_queries_that_are_left_out_are_told():
    query, gallery = street(5)
    query.append((query[0][0], 1000, 1))
    embeddings, columns = whole(query, gallery)
    with pytest.warns(UserWarning, match="^1 of 15 queries have no image of their class by another camera"):
        metrics, _ = evaluate_retrieval(embeddings, [1], **columns)
    assert metrics["mAP"] == pytest.approx(one_query_at_a_time(query, gallery)[0]["mAP"], abs=1e-12)


def test_without_masks_no_image_finds_itself():
    """As held-out training people are evaluated: every image asks all, and its own camera holds itself."""
    query, gallery = street(5)
    crops = [crop for crop in query + gallery if crop[1] > 0]
    embeddings, columns = whole(crops, [])
    metrics, _ = evaluate_retrieval(embeddings, [1], cameras=columns["cameras"])
    assert {key: metrics[key] for key in ("rank1", "mAP")} == pytest.approx(
        {key: one_query_at_a_time(crops, crops)[0][key] for key in ("rank1", "mAP")}, abs=1e-12
    )
