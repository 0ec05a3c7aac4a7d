import math

import oracles
import pytest
import torch
from largest import LargestTensor
from pinned import assert_close, case, names
from torch.autograd import gradcheck
from torch.nn.functional import triplet_margin_loss

from metric_kd.errors import UserError
from metric_kd.functional import contrastive, l1_triplet, l2_triplet
from metric_kd.losses import triplet as triplet_module
from metric_kd.losses.contrastive import contrastive_all
from metric_kd.losses.samplers import SAMPLERS, AllPairs
from metric_kd.losses.term import TERMS
from metric_kd.losses.triplet import L2Triplet, l1_triplet_all, l2_triplet_all
from metric_kd.types import Batch, Output

LOSSES = {"l1_triplet": l1_triplet, "l2_triplet": l2_triplet, "contrastive": contrastive}
OVER_ALL = {"l1_triplet": l1_triplet_all, "l2_triplet": l2_triplet_all, "contrastive": contrastive_all}
GOLDEN = [n for n in names() if n.startswith(("rkd_l1triplet", "rkd_l2triplet", "rkd_contrastive"))]


def rows(n, d, dtype=torch.float64, seed=0):
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run_term(name, embeddings, labels, **options):
    x = embeddings.clone().requires_grad_()
    batch = Batch(torch.zeros(len(x), 3, 1, 1, dtype=torch.uint8), labels, torch.arange(len(x)))
    loss = TERMS[name](**options)(Output(embedding=x), None, batch)
    loss.backward()
    return loss, x.grad


def test_all_golden_cases_are_here():
    assert len(GOLDEN) == 11


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    pinned = case(name)
    loss = name.split("_")[1].replace("triplet", "_triplet")
    options = {"sample": name.split("_")[-1], "margin": pinned.hyper["margin"]}
    value, gradient = run_term(loss, pinned.inputs["embeddings"], pinned.inputs["labels"], **options)
    assert_close(value, pinned.outputs["loss"])
    assert_close(gradient, pinned.outputs["grad_embeddings"])


@pytest.mark.parametrize("width", [1, 2, 9])
def test_oracles(width):
    x = rows(9, width)
    triplets = SAMPLERS["all"]()(x, torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 0]))
    assert_close(l1_triplet(x, *triplets, 0.3), oracles.triplet(x, *triplets, 0.3, 1))
    assert_close(l2_triplet(x, *triplets, 0.3), oracles.triplet(x, *triplets, 0.3, 2))
    assert_close(contrastive(x, *triplets, 2.0), oracles.contrastive(x, *triplets, 2.0))


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    x = rows(7, 4).requires_grad_()
    triplets = SAMPLERS["all"]()(x, torch.tensor([0, 0, 1, 1, 1, 2, 0]))
    assert gradcheck(lambda x: LOSSES[name](x, *triplets, 1.0), x)


@pytest.mark.parametrize("p, loss", [(1, l1_triplet), (2, l2_triplet)])
def test_equals_torch_on_many_triplets(p, loss):
    x, labels = rows(64, 32, torch.float32), torch.arange(13).repeat_interleave(5)[:64]
    a, i, j = SAMPLERS["all"]()(x, labels)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    value = loss(ours, a, i, j, 0.2)
    expected = triplet_margin_loss(theirs[a], theirs[i], theirs[j], margin=0.2, p=p)
    value.backward()
    expected.backward()
    assert_close(value, expected.detach(), 1e-5)
    assert_close(ours.grad, theirs.grad, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sample", list(SAMPLERS))
@pytest.mark.parametrize("name", LOSSES)
def test_without_triplets_the_loss_is_zero_and_so_is_the_gradient(name, sample, dtype):
    for labels in (torch.zeros(4, dtype=torch.int64), torch.arange(4)):
        value, gradient = run_term(name, rows(4, 3, dtype), labels, sample=sample)
        assert value.item() == 0 and (gradient == 0).all() and gradient.shape == (4, 3)


@pytest.mark.parametrize("sample", list(SAMPLERS))
@pytest.mark.parametrize("name", LOSSES)
def test_a_collapsed_batch_is_finite(name, sample):
    value, gradient = run_term(name, torch.ones(6, 3), torch.tensor([0, 0, 0, 1, 1, 1]), sample=sample)
    assert value.item() == pytest.approx(0.2 if name != "contrastive" else 0.02, rel=1e-3)
    assert gradient.isfinite().all() and gradient.abs().max() < 2


def test_half_precision_embeddings_give_a_float32_loss_and_half_gradients():
    value, gradient = run_term("l2_triplet", rows(8, 4, torch.bfloat16), torch.arange(4).repeat(2))
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16 and math.isfinite(value.item())


def both(name, embeddings, labels, margin):
    """(value, gradient) straight from the distances, and from the triplets that the sampler lists."""
    found = []
    for loss in (OVER_ALL[name], lambda x, labels, margin: LOSSES[name](x, *AllPairs()(x, labels), margin)):
        x = embeddings.clone().requires_grad_()
        value = loss(x, labels, margin)
        value.backward()
        found.append((value.detach(), x.grad))
    return found


@pytest.fixture(params=[2**17, 30, 1])
def tile(request, monkeypatch):
    """Tiles of several sizes: the whole batch, some anchors, one anchor."""
    monkeypatch.setitem(triplet_module.TILE, "cpu", request.param)


@pytest.mark.parametrize("margin", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("name", OVER_ALL)
@pytest.mark.parametrize("seed", range(4))
def test_all_triplets_without_listing_them(name, seed, margin, tile):
    labels = torch.randint(0, 4 + 4 * seed, (21,), generator=torch.Generator().manual_seed(seed))
    labels[labels == 1] = 0  # one class is large
    x = rows(21, 4, seed=seed)
    x[5], x[7] = x[2], x[2]  # duplicates, of one class and of two
    (value, gradient), (expected, expected_gradient) = both(name, x, labels, margin)
    assert value > 0 or margin == 0
    assert_close(value, expected, 1e-12)
    assert_close(gradient, expected_gradient, 1e-12)


@pytest.mark.parametrize("name", OVER_ALL)
def test_ties_at_the_margin_are_as_where_triplets_are_listed(name):
    grid = torch.tensor([[0.0], [1], [2], [3], [4], [5]], dtype=torch.float64)
    for margin in (0.0, 1.0, 2.0):
        ours, listed = both(name, grid, torch.tensor([0, 0, 1, 1, 0, 1]), margin)
        assert_close(ours[0], listed[0], 1e-12)
        assert_close(ours[1], listed[1], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("labels", [[], [0], [0, 0], [0, 1], [0, 0, 1], [0, 0, 0], [0, 1, 2]])
@pytest.mark.parametrize("name", OVER_ALL)
def test_small_batches_of_all_triplets(name, labels, dtype):
    x, labels = rows(len(labels), 3, dtype), torch.tensor(labels, dtype=torch.int64)
    (value, gradient), (expected, expected_gradient) = both(name, x, labels, 1.0)
    assert value.dtype == expected.dtype and gradient.dtype == dtype and value.shape == ()
    assert (value == 0) == (expected == 0)
    assert torch.allclose(value, expected, rtol=1e-5)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-2 if dtype.itemsize == 2 else 1e-4)


@pytest.mark.parametrize("name", OVER_ALL)
def test_gradcheck_of_all_triplets(name):
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    assert gradcheck(lambda x: OVER_ALL[name](x, labels, 1.0), rows(7, 4).requires_grad_())


@pytest.mark.parametrize("name", OVER_ALL)
def test_all_triplets_keep_nan_visible_and_autocast_out(name):
    x, labels = rows(12, 4, torch.float32), torch.arange(4).repeat(3)
    expected = OVER_ALL[name](x, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(OVER_ALL[name](x, labels), expected)
    for row in range(12):
        bad = x.clone()
        bad[row, 1] = float("nan")
        assert OVER_ALL[name](bad, labels).isnan()


@pytest.mark.parametrize("name", OVER_ALL)
def test_the_term_lists_triplets_only_for_other_samplers(name, monkeypatch):
    class Fewer(AllPairs):
        def choose(self, pairs, negatives, anchor, positive):
            return super().choose(pairs, negatives, anchor[:1], positive[:1])

    class Doubled(TERMS[name]):
        def over(self, pairs, triplets):
            return 2 * super().over(pairs, triplets)

    x, labels = rows(12, 4), torch.arange(4).repeat(3)
    batch = Batch(torch.zeros(12, 3, 1, 1, dtype=torch.uint8), labels, torch.arange(12))
    listed = LOSSES[name](x, *AllPairs()(x, labels))
    assert_close(Doubled(sample="all")(Output(embedding=x), None, batch), 2 * listed, 1e-12)
    term = TERMS[name](sample="all")
    term.sampler = Fewer()
    assert_close(term(Output(embedding=x), None, batch), LOSSES[name](x, *Fewer()(x, labels)), 1e-12)
    monkeypatch.setattr(AllPairs, "choose", None)
    assert_close(TERMS[name](sample="all")(Output(embedding=x), None, batch), listed, 1e-12)


def test_a_loss_may_redefine_both():
    class Half(L2Triplet):
        def over(self, pairs, triplets):
            return 0.5 * super().over(pairs, triplets)

        def over_all(self, pairs, labels):
            return 0.5 * super().over_all(pairs, labels)

    assert Half.over_all is not triplet_module.TripletTerm.over_all
    x, labels = rows(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    batch = Batch(torch.zeros(6, 3, 1, 1, dtype=torch.uint8), labels, torch.arange(6))
    assert_close(Half()(Output(embedding=x), None, batch), 0.5 * l2_triplet_all(x, labels), 1e-12)


def test_all_triplets_make_nothing_larger_than_the_distances(monkeypatch):
    monkeypatch.setitem(triplet_module.TILE, "cpu", 2**10)
    x, labels = rows(64, 8), torch.arange(64) // 8
    for loss in OVER_ALL.values():
        with LargestTensor() as largest:
            loss(x.clone().requires_grad_(), labels).backward()
        assert largest.elements == 64 * 64
    with LargestTensor() as largest:
        l2_triplet(x, *AllPairs()(x, labels))
    assert largest.elements >= 64 * 7 * 56


def test_bad_options():
    for loss in OVER_ALL.values():
        with pytest.raises(UserError, match="one label per embedding"):
            loss(rows(3, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="margin"):
        TERMS["l2_triplet"](margin=-1.0)
    with pytest.raises(UserError, match="did you mean 'hard'"):
        TERMS["contrastive"](sample="hrd")
