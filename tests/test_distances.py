import pytest
import torch
from pinned import assert_close, case
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import pairwise_distance

from metric_kd import distances as distances_module
from metric_kd.distances import COINCIDENT, Pairwise, paired, sharing, unit_rows
from metric_kd.errors import UserError


def rows(n=7, d=5, dtype=torch.float64, seed=0):
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_golden_pdist():
    pinned = case("rkd_pdist")
    pairs = Pairwise(pinned.inputs["e"])
    assert_close(pairs.squared, pinned.outputs["squared"])
    assert_close(pairs.distances, pinned.outputs["euclid"])
    assert (pairs.squared.diagonal() == 0).all() and (pairs.distances.diagonal() == 0).all()


@pytest.mark.parametrize("form", ["squared", "distances", "gram"])
def test_gradients(form):
    x = rows().requires_grad_()
    assert gradcheck(lambda x: getattr(Pairwise(x), form), x)
    assert gradgradcheck(lambda x: getattr(Pairwise(x), form), x)


@pytest.mark.parametrize("p", [1, 2])
def test_offset_distances_are_those_of_torch(p):
    x = rows()
    expected = torch.stack([pairwise_distance(x[i : i + 1], x, p=p) for i in range(len(x))])
    assert_close(Pairwise(x).offset_distances(p), expected, 1e-12)
    assert gradcheck(lambda x: Pairwise(x).offset_distances(p), x.requires_grad_())
    assert p == 1 or gradgradcheck(lambda x: Pairwise(x).offset_distances(p), x)


@pytest.fixture
def large(monkeypatch):
    """Batches of any size count as large, in strips that do not divide them."""
    monkeypatch.setattr(distances_module, "LARGE", 2)
    monkeypatch.setattr(distances_module, "STRIP", 7)


def value_and_gradient(x, weight, dtype):
    x = x.detach().to(dtype, copy=True).requires_grad_()
    squared = Pairwise(x).squared
    squared.backward(weight.to(dtype))
    return squared.detach().double(), x.grad.double()


@pytest.mark.parametrize("gap, offset", [(1.0, 0.0), (1e-3, 0.0), (1e-5, 0.0), (0.0, 0.0), (1e-3, 100.0)])
def test_float32_products_of_large_batches_lose_no_digits(gap, offset, large, monkeypatch):
    x = rows(40, 64, torch.float32)
    x[3] = x[8] + gap * x[4]
    x[20:24] = x[16:20] + gap * x[30:34]
    x += offset
    # An upstream gradient as that of distances, 1/d, so that the near pairs weigh most; not symmetric.
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    weight = rows(40, 40, seed=1) / exact.clamp(min=1e-6).fill_diagonal_(1.0)
    squared, gradient = value_and_gradient(x, weight, torch.float32)
    true = exact.square().clamp(min=COINCIDENT).fill_diagonal_(0.0)
    assert ((squared - true).abs() / true.clamp(min=COINCIDENT)).max() < 2e-6
    assert torch.equal(squared, squared.T)
    monkeypatch.setattr(distances_module, "LARGE", 1000)
    expected = value_and_gradient(x, weight, torch.float64)[1]
    assert_close(gradient, expected, 2e-5)


def test_float32_products_are_taken_where_they_serve(large, monkeypatch):
    calls = []
    real = distances_module._in_single_precision
    monkeypatch.setattr(distances_module, "_in_single_precision", lambda x: calls.append(real(x)) or calls[-1])

    def taken(x):
        calls.clear()
        Pairwise(x).squared  # noqa: B018
        return calls

    spread = rows(40, 8, torch.float32)
    assert taken(spread)[0] is not None
    assert not taken(spread.double()) and not taken(spread[:1])
    monkeypatch.setattr(distances_module, "MOST_NEAR", 1)
    for crowded in (spread * 1e-7, torch.ones(40, 8), spread[:2].repeat(20, 1) + 1e-3 * spread):
        (found,) = taken(crowded)
        assert found is None and torch.equal(Pairwise(crowded).squared, Pairwise(crowded.double()).squared.float())


def test_lowered_matmul_precision_does_not_reach_the_distances(large):
    x = rows(40, 8, torch.float32)
    expected = Pairwise(x.double()).squared.float()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(Pairwise(x).squared, expected)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_batches_under_autocast_and_with_nan(large, dtype):
    x = rows(40, 8, dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Pairwise(x).distances
        inside.sum().backward()
    outside = Pairwise(x.detach().double()).distances.float()
    assert inside.dtype == torch.float32 and x.grad.dtype == dtype
    assert_close(inside, outside, 1e-6)
    with torch.no_grad():
        x[5, 0] = float("nan")
    assert Pairwise(x).distances[5, 6].isnan()


def test_large_batches_can_be_differentiated_twice(large):
    x, weight = rows(30, 8), rows(30, 30, seed=1).square()

    def second(x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((weight.to(x) * Pairwise(x).squared.square()).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert_close(second(x.float()).double(), second(x), 1e-5)


def test_float32_far_from_the_origin_is_as_accurate_as_its_rows():
    x = rows(20, 64, torch.float32) * 1e-2 + 100
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    ours = Pairwise(x).distances
    assert ours.dtype == torch.float32
    assert ((ours - exact).abs() / (exact + torch.eye(20))).max() < 1e-6
    plain = (2 * x.square().sum(1) - 2 * (x @ x.T)).clamp(min=1e-12).sqrt()
    assert (plain - exact).abs().max() > 0.1  # the naive form is not


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_have_a_small_distance_and_no_gradient(dtype, scale):
    x = rows(6, 33, dtype) * scale
    x[3] = x[1]
    x.requires_grad_()
    distances = Pairwise(x).distances
    assert distances[1, 3].item() == pytest.approx(1e-6) and distances[3, 3] == 0
    (gradient,) = torch.autograd.grad(distances[1, 3], x)
    assert (gradient == 0).all()
    (gradient,) = torch.autograd.grad(Pairwise(x).distances.sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() < 100


@pytest.mark.parametrize("scale, gap", [(1.0, 1e-8), (1e3, 1e-4)])
def test_rows_that_the_gram_form_cannot_tell_apart_count_as_one_point(scale, gap):
    x = rows(6, 33) * scale
    x[3] = x[1] + gap / 33**0.5
    x.requires_grad_()
    distances = Pairwise(x).distances
    assert distances[1, 3].item() == pytest.approx(1e-6)
    (gradient,) = torch.autograd.grad(distances[1, 3], x)
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_raised_and_autocast_does_not_reach_in(dtype):
    x = rows(8, 16, dtype)
    assert Pairwise(x).distances.dtype == torch.float32
    y = rows(8, 16, torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [Pairwise(y).squared, Pairwise(y).gram, Pairwise(y).offset_distances(1)]
    outside = [Pairwise(y).squared, Pairwise(y).gram, Pairwise(y).offset_distances(1)]
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_nan_stays_visible():
    x = rows()
    x[2, 1] = float("nan")
    assert Pairwise(x).distances[0, 2].isnan()


def test_sharing_is_by_tensor_object_and_ends_with_the_context():
    x = rows().requires_grad_()
    assert Pairwise.of(x) is not Pairwise.of(x)
    with sharing():
        first = Pairwise.of(x)
        assert Pairwise.of(x) is first and Pairwise.of(first) is first
        assert Pairwise.of(x.clone()) is not first
        with torch.no_grad():
            assert not Pairwise.of(x).distances.requires_grad  # a sampler's look does not spoil the loss's gradient
        assert Pairwise.of(x).distances.requires_grad
        with sharing():
            assert Pairwise.of(x) is not first
        assert Pairwise.of(x) is first
    assert Pairwise.of(x) is not first


def test_a_pairwise_first_read_without_gradients_still_has_them():
    x = rows().requires_grad_()
    pairs = Pairwise(x)
    with torch.no_grad():
        assert pairs.distances.requires_grad
    pairs.distances.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("n", [0, 1, 2])
def test_small_batches(n):
    assert Pairwise(rows(n)).distances.shape == (n, n)


def test_bad_input():
    with pytest.raises(UserError, match="got \\(3,\\)"):
        Pairwise(torch.zeros(3))
    with pytest.raises(UserError, match="floating-point"):
        Pairwise(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(UserError, match="got 3 and 4 rows"):
        paired(rows(3), rows(4))


def test_unit_rows():
    x = rows(5, 3)
    x[2] = 0
    x.requires_grad_()
    units = unit_rows(x)
    assert (units[2] == 0).all()
    assert torch.allclose(units.norm(dim=1), torch.tensor([1.0, 1, 0, 1, 1], dtype=torch.float64))
    units.sum().backward()
    assert x.grad.isfinite().all() and (x.grad[2] == 0).all()
    assert gradcheck(unit_rows, rows(4, 3).requires_grad_())


@pytest.mark.parametrize(("n", "dtype"), [(40, torch.float32), (40, torch.float64), (600, torch.float32)])
def test_the_shorter_way_back_gives_the_same_gradient(n, dtype):
    """Of symmetric gradients with a diagonal of zeros, near and coincident rows included."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, dtype=dtype, generator=draw)
    x[1], x[3] = x[0], x[2] + 1e-3
    weight = torch.randn(n, n, dtype=dtype, generator=draw)
    weight = (weight + weight.T).fill_diagonal_(0.0)
    grads = []
    for name in ("squared", "squared_for_symmetric"):
        rows = x.clone().requires_grad_()
        before = weight.clone()
        squared = getattr(Pairwise(rows), name)
        squared.backward(weight)
        assert torch.equal(weight, before)  # it belongs to the caller
        grads.append((squared.detach(), rows.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[1][1], grads[0][1], rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-9)


def test_both_ways_share_one_product():
    rows = torch.randn(8, 3).requires_grad_()
    pairs = Pairwise(rows)
    assert pairs.squared.data_ptr() == pairs.squared_for_symmetric.data_ptr()
