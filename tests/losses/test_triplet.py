import math

import oracles
import pytest
import torch
from pinned import assert_close, case, names
from torch.autograd import gradcheck
from torch.nn.functional import triplet_margin_loss

from metric_kd.errors import UserError
from metric_kd.functional import contrastive, l1_triplet, l2_triplet
from metric_kd.losses.samplers import SAMPLERS
from metric_kd.losses.term import TERMS
from metric_kd.types import Batch, Output

LOSSES = {"l1_triplet": l1_triplet, "l2_triplet": l2_triplet, "contrastive": contrastive}
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


def test_bad_options():
    with pytest.raises(UserError, match="margin"):
        TERMS["l2_triplet"](margin=-1.0)
    with pytest.raises(UserError, match="did you mean 'hard'"):
        TERMS["contrastive"](sample="hrd")
