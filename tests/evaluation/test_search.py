"""Neighbours equal those of plain N x N distances in float64, in both back ends."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from metric_kd.errors import UserError
from metric_kd.evaluation import search, tiles
from metric_kd.evaluation.search import check_ks, find_neighbours

BACK_ENDS = ["faiss", "torch"]


@pytest.fixture(params=BACK_ENDS)
def prefer(request):
    if request.param == "faiss":
        pytest.importorskip("faiss")
    return request.param


def oracle(query, gallery, k, query_ids=None, gallery_ids=None):
    """All distances in float64, the query itself struck out by its id, ties by row."""
    q, g = (np.asarray(x, dtype=np.float64) for x in (query, gallery))
    far = np.sqrt(((q[:, None] - g[None]) ** 2).sum(-1))
    if query_ids is not None:
        far[np.asarray(query_ids)[:, None] == np.asarray(gallery_ids)[None]] = np.inf
    order = np.argsort(far, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(far, order, 1)


def assert_nearest(found, query, gallery, rows):
    """The oracle's rows; another only where its distance is another too, by no more than sums in float32 can tell."""
    q, g = (np.asarray(x, dtype=np.float64) for x in (query, gallery))
    ours, theirs = (np.sqrt(((q[:, None] - g[at]) ** 2).sum(2)) for at in (found.indices.numpy(), rows))
    gap = np.abs(ours - theirs)
    assert ((found.indices.numpy() == rows) | ((gap > 0) & (gap <= 1e-6 * theirs))).all()


def random_set(count, dimensions, seed=0, classes=7):
    draw = np.random.default_rng(seed)
    vectors = torch.from_numpy(draw.standard_normal((count, dimensions)).astype(np.float32))
    return vectors, torch.from_numpy(draw.integers(0, classes, count))


@pytest.mark.parametrize(("count", "dimensions", "k"), [(2, 3, 1), (30, 4, 29), (257, 16, 8), (300, 64, 120)])
def test_one_set_equals_the_oracle(prefer, count, dimensions, k):
    x, labels = random_set(count, dimensions)
    found = find_neighbours(x, k=k, query_labels=labels, prefer=prefer)
    rows, far = oracle(x, x, k, range(count), range(count))
    assert_nearest(found, x, x, rows)
    np.testing.assert_allclose(found.distances, far, rtol=1e-5)
    assert found.indices.dtype == torch.int64 and found.distances.dtype == torch.float32
    assert torch.equal(found.query_labels, labels) and torch.equal(found.gallery_labels, labels)


def test_query_and_gallery_with_shared_images(prefer):
    x, labels = random_set(120, 8)
    asked, offered = torch.arange(0, 60), torch.arange(40, 120)
    found = find_neighbours(
        x[asked],
        x[offered],
        5,
        query_labels=labels[asked],
        gallery_labels=labels[offered],
        query_ids=asked,
        gallery_ids=offered,
        prefer=prefer,
    )
    rows, _ = oracle(x[asked], x[offered], 5, asked, offered)
    assert_nearest(found, x[asked], x[offered], rows)
    assert not (offered[found.indices] == asked[:, None]).any()


def test_without_ids_nothing_is_left_out(prefer):
    x, labels = random_set(20, 4)
    found = find_neighbours(x, x.clone(), 1, query_labels=labels, gallery_labels=labels, prefer=prefer)
    assert torch.equal(found.indices[:, 0], torch.arange(20))
    assert torch.equal(found.distances[:, 0], torch.zeros(20))


@pytest.mark.parametrize("copies", [2, 3, 40])
def test_duplicates_remove_the_query_itself_and_tie_by_row(prefer, copies):
    base, _ = random_set(6, 5)
    x = base.repeat(copies, 1)
    found = find_neighbours(x, k=3, query_labels=torch.zeros(len(x)), prefer=prefer)
    rows, _ = oracle(x, x, 3, range(len(x)), range(len(x)))
    if copies < 40:  # of more equal ones than candidates, rounding of the first search chooses
        assert np.array_equal(found.indices, rows)
    assert (found.indices % 6 == (torch.arange(len(x)) % 6)[:, None])[:, : copies - 1].all()
    assert not (found.indices == torch.arange(len(x))[:, None]).any()
    assert (found.distances[:, : min(3, copies - 1)] == 0).all()


def test_collapsed_embeddings_find_the_first_rows(prefer):
    x = torch.full((50, 4), 0.3)
    found = find_neighbours(x, k=4, query_labels=torch.zeros(50), prefer=prefer)
    assert np.array_equal(found.indices, oracle(x, x, 4, range(50), range(50))[0])
    assert (found.distances == 0).all()


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_vectors_far_from_the_origin(prefer, offset):
    x, labels = random_set(200, 16)
    x = x + offset  # in float32, and the oracle sees the rounded values
    found = find_neighbours(x, k=8, query_labels=labels, prefer=prefer)
    rows, far = oracle(x, x, 8, range(200), range(200))
    np.testing.assert_allclose(found.distances, far, rtol=2e-6)
    assert (found.indices.numpy() == rows).mean() > 0.995


def test_close_pairs_far_from_the_mean(prefer):
    """Pairs 1e-3 apart at norm 30: a Gram form in float32 has an error of the size of their squared distance."""
    base, labels = random_set(150, 32)
    draw = torch.Generator().manual_seed(1)
    x = torch.cat([30 * base, 30 * base + 1e-3 * torch.randn(150, 32, generator=draw)])
    found = find_neighbours(x, k=1, query_labels=torch.cat([labels, labels]), prefer=prefer)
    rows, far = oracle(x, x, 1, range(300), range(300))
    assert_nearest(found, x, x, rows)
    np.testing.assert_allclose(found.distances, far, rtol=1e-4)


def test_blocks_and_back_ends_agree(monkeypatch):
    pytest.importorskip("faiss")
    x, labels = random_set(133, 24)
    x[100:110] = x[0]
    first = {name: find_neighbours(x, k=6, query_labels=labels, prefer=name) for name in BACK_ENDS}
    assert_nearest(first["faiss"], x, x, first["torch"].indices.numpy())
    torch.testing.assert_close(first["faiss"].distances, first["torch"].distances, rtol=3e-7, atol=0)  # order of sums
    monkeypatch.setattr(tiles, "TILE", 3000)  # 32 rows of the gallery for 133 queries
    monkeypatch.setattr(search, "RESCORE_TILE", 500)
    for name in BACK_ENDS:
        for block in (1, 7, 133, 4096):
            other = find_neighbours(x, k=6, query_labels=labels, prefer=name, block=block)
            assert_nearest(other, x, x, first[name].indices.numpy())
            torch.testing.assert_close(other.distances, first[name].distances, rtol=3e-7, atol=0)


@pytest.mark.parametrize("tile", [1, 64, 100, 250])
@pytest.mark.parametrize("group", [1, 3, 32])
@pytest.mark.parametrize("k", [1, 6, 60])
@pytest.mark.parametrize("ordered", [False, True])
def test_tiles_and_groups_of_any_size(prefer, monkeypatch, tile, group, k, ordered):
    """Last tiles and groups that are not full, copies in several tiles, and tiles that are ever nearer."""
    monkeypatch.setattr(tiles, "GROUP", group)
    x, labels = random_set(250, 5)
    if ordered:
        x = x[x.norm(dim=1).argsort(descending=True)]
    x[[7, 90, 91, 200, 249]] = x[3].clone()
    monkeypatch.setattr(tiles, "TILE", 10 * tile)
    found = find_neighbours(x, k=k, query_labels=labels, prefer=prefer, block=10)
    rows, far = oracle(x, x, k, range(250), range(250))
    assert_nearest(found, x, x, rows)
    np.testing.assert_allclose(found.distances, far, rtol=1e-5)


def test_a_query_far_from_all_of_the_gallery(prefer):
    """|q|^2 is 1e10 and the squared distances differ by about 1e5: their order survives in float32."""
    x, labels = random_set(200, 16)
    far = torch.full((3, 16), 25_000.0) + x[:3]
    found = find_neighbours(far, x, 5, query_labels=labels[:3], gallery_labels=labels, prefer=prefer)
    for row, (near, q) in enumerate(zip(found.indices, far, strict=True)):
        order = (x.double() - q.double()).norm(dim=1).argsort()
        assert set(near.tolist()) <= set(order[:9].tolist()), row


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_stay_whole_where_torch_may_lower_them(prefer, precision):
    x, labels = random_set(300, 64)
    x[150:] = x[:150] + 1e-3 * x[150:]
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = find_neighbours(x, k=3, query_labels=labels, prefer=prefer)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(kept)
    assert_nearest(found, x, x, oracle(x, x, 3, range(300), range(300))[0])


def test_rounding_of_the_first_search_is_mended(prefer):
    """Three candidates at 0.1 to 0.3, at norm 1000: there |q|^2 - 2 q.g + |g|^2 is wrong by about 0.1 in float32."""
    draw = torch.Generator().manual_seed(2)
    query = 1000 * torch.nn.functional.normalize(torch.randn(60, 8, generator=draw))
    query = torch.cat([query, -query])
    ways = torch.nn.functional.normalize(torch.randn(120, 3, 8, generator=draw), dim=2)
    gallery = (query[:, None] + torch.tensor([0.3, 0.1, 0.2])[:, None] * ways).flatten(0, 1)
    labels = torch.zeros(len(gallery))
    found = find_neighbours(query, gallery, 1, query_labels=labels[:120], gallery_labels=labels, prefer=prefer)
    assert torch.equal(found.indices[:, 0], 3 * torch.arange(120) + 1)
    np.testing.assert_allclose(found.distances, 0.1, rtol=2e-3)


@pytest.mark.parametrize("k", [20, 120])
def test_many_ties_on_a_grid(prefer, k):
    """Integer points have many equal distances; what is found is right where the order among equals is free."""
    side = torch.arange(12.0)
    x = torch.cartesian_prod(side, side)
    found = find_neighbours(x, k=k, query_labels=torch.zeros(len(x)), prefer=prefer)
    np.testing.assert_allclose(found.distances, oracle(x, x, k, range(144), range(144))[1], rtol=1e-6)
    assert all(len(set(row)) == k for row in found.indices.tolist())


def test_half_types_and_inference_tensors_are_taken(prefer):
    x, labels = random_set(40, 8)
    with torch.inference_mode():
        half = x.bfloat16()
    found = find_neighbours(half, k=2, query_labels=labels, prefer=prefer)
    assert_nearest(found, half.float(), half.float(), oracle(half.float(), half.float(), 2, range(40), range(40))[0])


def test_backend_and_fallback(monkeypatch):
    x, labels = random_set(30, 4)
    monkeypatch.setattr(search, "_faiss", lambda: None)
    assert search.backend() == "torch"
    found = find_neighbours(x, k=2, query_labels=labels)
    assert_nearest(found, x, x, oracle(x, x, 2, range(30), range(30))[0])
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        find_neighbours(x, k=2, query_labels=labels, prefer="faiss")
    with pytest.raises(UserError, match="did you mean 'faiss'"):
        find_neighbours(x, k=2, query_labels=labels, prefer="fais")


def test_without_faiss_installed_torch_searches():
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "import torch\n"
        "from metric_kd.evaluation.metrics import recall\n"
        "from metric_kd.evaluation.search import backend\n"
        "assert backend() == 'torch'; print(recall(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "{1: 1.0}", done.stderr


def test_faiss_follows_torch_threads(monkeypatch):
    faiss = pytest.importorskip("faiss")
    x, labels = random_set(30, 4)
    faiss.omp_set_num_threads(2)  # of torch too, where both share one OpenMP: hence the patch
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    find_neighbours(x, k=1, query_labels=labels, prefer="faiss")
    assert faiss.omp_get_max_threads() == 1


def test_memory_stays_far_below_all_distances(prefer, monkeypatch):
    """12,000 x 12,000 float32 distances are 550 MiB; the peak is a small part of that."""
    monkeypatch.setattr(tiles, "TILE", 1 << 20)
    x, labels = random_set(12_000, 16)
    find_neighbours(x[:500], k=1, query_labels=labels[:500], prefer=prefer)  # warm up libraries
    before, peak = resident_peak(lambda: find_neighbours(x, k=4, query_labels=labels, prefer=prefer, block=256))
    assert peak - before < 100 * 2**20


def test_memory_holds_no_copy_of_the_gallery(prefer, monkeypatch):
    """40,000 x 256 float32 are 39 MiB, and a mean in float64 would make 78 of them; tiles and buffers take about 16."""
    monkeypatch.setattr(tiles, "TILE", 1 << 19)
    x, labels = random_set(40_000, 256)
    find_neighbours(x[:300], k=1, query_labels=labels[:300], prefer=prefer)  # warm up libraries
    asked = {"query_labels": labels[:300], "gallery_labels": labels}
    before, peak = resident_peak(lambda: find_neighbours(x[:300], x, 4, **asked, prefer=prefer, block=128))
    assert peak - before < 36 * 2**20


def resident_peak(work):
    from pathlib import Path

    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("needs Linux's /proc")
    try:
        reset.write_text("5")
    except OSError:
        pytest.skip("the peak of memory cannot be reset here")

    def read(key):
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])

    before = read("VmRSS")
    work()
    return before, read("VmHWM")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
def test_refuses_embeddings_that_are_not_finite(bad):
    x, labels = random_set(10, 4)
    x[3, 1] = bad
    with pytest.raises(UserError, match="1 of 10 query embeddings are not finite"):
        find_neighbours(x, k=1, query_labels=labels)


def test_refuses_k_above_the_gallery():
    x, labels = random_set(5, 4)
    find_neighbours(x, k=4, query_labels=labels)
    with pytest.raises(UserError, match="K = 5 is larger than the gallery, where a query finds 4 images"):
        find_neighbours(x, k=5, query_labels=labels)
    find_neighbours(x, x, 5, query_labels=labels, gallery_labels=labels)


def test_refuses_what_does_not_fit():
    x, labels = random_set(5, 4)
    with pytest.raises(UserError, match="4 dimensions, the gallery's 3"):
        find_neighbours(x, x[:, :3], query_labels=labels, gallery_labels=labels)
    with pytest.raises(UserError, match="same id"):
        find_neighbours(x, x, query_labels=labels, gallery_labels=labels, query_ids=labels * 0, gallery_ids=labels * 0)
    with pytest.raises(UserError, match="shape"):
        find_neighbours(x[0], query_labels=labels)
    with pytest.raises(ValueError, match="one entry per embedding"):
        find_neighbours(x, query_labels=labels[:3])
    with pytest.raises(ValueError, match="gallery_labels"):
        find_neighbours(x, x, query_labels=labels)


@pytest.mark.parametrize(
    ("ks", "message"), [([], "at least one K"), ([0], "K = 0"), ([1.5], "K = 1.5"), ([1, 10], "K = 10 is larger")]
)
def test_check_ks(ks, message):
    check_ks([1, 9], 9)
    with pytest.raises(UserError, match=message):
        check_ks(ks, 9)
