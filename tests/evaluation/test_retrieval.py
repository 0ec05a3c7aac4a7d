"""Query and gallery sets, and the way from batches to Recall@K."""

import numpy as np
import pytest
import torch

from metric_kd.errors import UserError
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.retrieval import check_ks, evaluate_retrieval, gallery_size


@pytest.fixture
def data():
    draw = np.random.default_rng(3)
    labels = draw.integers(0, 6, 60)
    x = (draw.standard_normal((60, 4)) + 1.2 * draw.standard_normal((6, 4))[labels]).astype(np.float32)
    return Embeddings(torch.from_numpy(x), torch.from_numpy(labels), torch.arange(60))


def masks(seed=0):
    draw = np.random.default_rng(seed)
    query = draw.random(60) < 0.5
    gallery = ~query | (draw.random(60) < 0.3)
    return query, gallery


def test_everything_is_query_and_gallery(hit_rate, data):
    metrics, found = evaluate_retrieval(data, [1, 4])
    assert metrics == pytest.approx({f"recall@{k}": hit_rate(data.vectors, data.labels, k) for k in (1, 4)})
    assert found.indices.shape == (60, 4)


@pytest.mark.parametrize("given", ["both", "query", "gallery"])
def test_query_and_gallery(hit_rate, data, given):
    query, gallery = masks()
    assert (query & gallery).any() and (query & ~gallery).any() and (gallery & ~query).any()
    query, gallery = (query if given != "gallery" else None), (gallery if given != "query" else None)
    metrics, found = evaluate_retrieval(data, [1, 2, 4], query=query, gallery=gallery)
    expected = {f"recall@{k}": hit_rate(data.vectors, data.labels, k, query, gallery) for k in (1, 2, 4)}
    assert metrics == pytest.approx(expected)
    queries = np.arange(60) if query is None else np.flatnonzero(query)
    offered = np.arange(60) if gallery is None else np.flatnonzero(gallery)
    assert not (offered[found.indices] == queries[:, None]).any()


def test_masks_are_of_the_data_set_whatever_the_order(data):
    query, gallery = masks()
    mixed = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = Embeddings(data.vectors[mixed], data.labels[mixed], mixed)
    straight, _ = evaluate_retrieval(data, [1, 2], query=query, gallery=gallery)
    assert evaluate_retrieval(shuffled, [1, 2], query=query, gallery=torch.from_numpy(gallery))[0] == straight


def test_a_query_class_that_the_gallery_lacks_is_a_miss(data):
    x = Embeddings(torch.tensor([[0.0], [0.1], [3.0]]), torch.tensor([0, 0, 1]), torch.arange(3))
    metrics, _ = evaluate_retrieval(x, [1], query=np.array([1, 0, 1], bool), gallery=np.array([0, 1, 1], bool))
    assert metrics == {"recall@1": 0.5}


def test_gallery_size_counts_what_a_query_can_find(data):
    query, gallery = masks()
    assert gallery_size(60) == 59
    assert gallery_size(60, query, ~query) == int((~query).sum())
    assert gallery_size(60, query, gallery) == int(gallery.sum()) - 1
    for q, g in ((None, None), (query, ~query), (query, gallery), (query, None)):
        largest = gallery_size(60, q, g)
        evaluate_retrieval(data, [largest], query=q, gallery=g)
        with pytest.raises(UserError, match="larger than the gallery"):
            evaluate_retrieval(data, [largest + 1], query=q, gallery=g)
        with pytest.raises(UserError, match="larger than the gallery"):
            check_ks([1, largest + 1], largest)


def test_refuses_masks_that_do_not_fit(data):
    with pytest.raises(UserError, match="no image is marked as query"):
        evaluate_retrieval(data, [1], query=np.zeros(60, bool))
    with pytest.raises(UserError, match="gallery column has 10 entries"):
        evaluate_retrieval(data, [1], gallery=np.ones(10, bool))
