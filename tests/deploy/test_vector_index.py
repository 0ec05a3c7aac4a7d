"""Structures of vectors: exact where they say so, the true nearest with all effort, and what they lose measured."""

import numpy as np
import pytest
from tiny import succeeds
from toys import FACTORIES, slow_oracle

from metric_kd.deploy import vector_index
from metric_kd.deploy.factory import Factory, check_factory, choose_factory, parse_factory
from metric_kd.deploy.measuring import measure
from metric_kd.deploy.vector_index import Approximate, Flat, build
from metric_kd.errors import UserError


@pytest.mark.parametrize("queries", [1, 5, 70])
def test_flat_is_exact_and_settles_ties_by_row(queries):
    draw_of = np.random.default_rng(0)
    vectors = draw_of.integers(-2, 3, (400, 3)).astype(np.float32)  # many ties and duplicates
    asked = draw_of.integers(-2, 3, (queries, 3)).astype(np.float32)
    rows, far = Flat(vectors).search(asked, 6)
    for query, near, distance in zip(asked, rows, far, strict=True):
        order, true = slow_oracle(vectors, query, 6)
        np.testing.assert_allclose(distance, true, rtol=1e-6)
        assert near.tolist() == order.tolist() or queries >= vector_index.DIRECT  # there, beyond the spare candidates


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_flat_is_exact_far_from_the_origin_too(offset):
    draw_of = np.random.default_rng(0)
    vectors = (draw_of.standard_normal((5000, 16)) + offset).astype(np.float32)
    for query in (draw_of.standard_normal((4, 16)) + offset).astype(np.float32):
        rows, far = Flat(vectors).search(query[None], 10)
        order, true = slow_oracle(vectors, query, 10)
        assert rows[0].tolist() == order.tolist()
        np.testing.assert_allclose(far[0], true, rtol=1e-5)


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8", "IVF2,PQ4"])
def test_with_all_effort_the_approximate_ones_find_the_true_nearest(factory, few_for_pq):
    vectors = few_for_pq
    index = build(parse_factory(factory), vectors, keep="float32" if "PQ" in factory else None)
    asked = np.random.default_rng(2).standard_normal((10, 8)).astype(np.float32)
    rows, far = index.search(asked, 5, 300)
    for query, near, distance in zip(asked, rows, far, strict=True):
        order, true = slow_oracle(vectors, query, 5)
        if "PQ" in factory:  # codes choose the candidates
            assert len(set(near) & set(order)) >= 2
            np.testing.assert_allclose(distance, np.linalg.norm(vectors[near] - query, axis=1), rtol=1e-5)
        else:
            assert near.tolist() == order.tolist()
            np.testing.assert_allclose(distance, true, rtol=1e-4)
    again = build(parse_factory(factory), vectors, keep="float32" if "PQ" in factory else None)
    assert all(np.array_equal(a, b) for a, b in zip(again.search(asked, 5), index.search(asked, 5), strict=True))
    assert measure(index, 300).recall1 >= 0.95


def test_fewer_are_found_where_the_lists_hold_fewer(few_for_pq):
    index = build(Factory("IVF", lists=100), few_for_pq)
    rows, far = index.search(few_for_pq[:1], 50, 1)
    assert rows[0, 0] == 0 and rows[0, -1] == -1 and np.isinf(far[0, -1])


@pytest.mark.parametrize("factory", FACTORIES)
def test_updating_keeps_order_and_vectors(factory, few_for_pq):
    vectors, new = few_for_pq, np.random.default_rng(3).standard_normal((20, 8)).astype(np.float32)
    keep = np.random.default_rng(4).random(300) < 0.7
    index = build(parse_factory(factory), vectors)
    for _ in range(2):  # twice: ids have gaps by then
        index = index.updated(keep, new)
        vectors = np.concatenate([vectors[keep], new])
        assert len(index) == len(vectors)
        if "PQ" not in factory:
            np.testing.assert_array_equal(index.vectors(), vectors)
        rows, _ = index.search(vectors, 3, 300)
        assert np.mean([row in near for row, near in enumerate(rows)]) > (0.5 if "PQ" in factory else 0.999)
        keep = np.ones(len(vectors), bool)
        keep[[0, 5, -1]] = False


def test_recall_is_measured_against_the_truth(few_for_pq):
    """A search that finds the second nearest first, and loses the tenth."""

    class Lossy(Flat):
        factory = Factory("HNSW", links=8)

        def search(self, queries, k, effort=None):
            rows, far = super().search(queries, min(k + 1, len(self)), effort)
            rows[:, [1, 2]] = rows[:, [2, 1]]
            rows[:, 10:] = rows[:, 11:12] if rows.shape[1] > 11 else rows[:, :1]
            return rows[:, :k], far[:, :k]

    class Harmless(Lossy):
        def search(self, queries, k, effort=None):
            return Flat.search(self, queries, k, effort)

    lossy = measure_as_approximate(Lossy(few_for_pq))
    assert lossy == pytest.approx((0.0, 0.9))
    assert measure_as_approximate(Harmless(few_for_pq)) == (1.0, 1.0)


def measure_as_approximate(index):
    from metric_kd.deploy.measuring import _recalls

    chosen = np.arange(0, 300, 7)
    return _recalls(index, None, index.vectors(), chosen, index.vectors()[chosen])


def test_few_vectors_and_duplicates_are_measured():
    assert measure(build(Factory("HNSW", links=8), np.ones((5, 4), np.float32))).recall10 == 1.0
    assert measure(Flat(np.ones((1, 4), np.float32))).recall1 is None


def test_factories_are_read_and_chosen():
    for text in FACTORIES:
        assert str(parse_factory(text)) == text
    assert str(choose_factory(99_999, 128)) == "Flat"
    assert str(choose_factory(250_000, 128)) == "IVF2000,Flat"
    assert str(choose_factory(4_000_000, 128)) == "IVF8000,PQ32"
    assert choose_factory(2_000_000, 30).pieces == 6 and choose_factory(2_000_000, 3).pieces == 1
    for text, words in [("HNSW", "HNSW32"), ("flat", "Flat"), ("LSH", "choose one of"), ("IVF0,Flat", "impossible")]:
        with pytest.raises(UserError, match=words):
            parse_factory(text)
    with pytest.raises(UserError, match="1,024 images or more, and there are 1,023"):
        check_factory(parse_factory("IVF1024,Flat"), 1023, 8)
    with pytest.raises(UserError, match="choose PQ4"):
        check_factory(parse_factory("IVF1,PQ3"), 1000, 8)


def test_kept_vectors_order_what_codes_find(few_for_pq, tmp_path):
    plain, kept = (build(parse_factory("IVF2,PQ4"), few_for_pq, keep) for keep in (None, "float16"))
    assert isinstance(kept, Approximate) and kept.kept.dtype == np.float16 and plain.vectors() is None
    assert measure(plain).recall1 is None
    assert measure(kept).recall1 > measure(plain, vectors=few_for_pq).recall1


def test_beside_libraries_that_teach_faiss_tensors():
    """They replace methods of its indexes in the whole process; so in a process of its own."""
    code = (
        "import numpy as np\n"
        "import faiss.contrib.torch_utils\n"
        "from metric_kd.deploy.factory import parse_factory\n"
        "from metric_kd.deploy.vector_index import build\n"
        "vectors = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)\n"
        "for factory in ('Flat', 'IVF4,Flat', 'HNSW8'):\n"
        "    index = build(parse_factory(factory), vectors)\n"
        "    rows, _ = index.search(vectors[:5], 1, 300)\n"
        "    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4], rows\n"
        "    assert isinstance(index.vectors(), np.ndarray) and (index.vectors() == vectors).all()\n"
        "    half = index.updated(np.arange(200) < 100, vectors[150:])\n"
        "    assert (half.vectors() == np.concatenate([vectors[:100], vectors[150:]])).all()\n"
    )
    succeeds(code)
