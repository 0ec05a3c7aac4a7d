import itertools

import oracles
import pytest
import torch
from pinned import assert_close, case

from metric_kd.distances import Pairwise, unit_rows
from metric_kd.errors import UserError
from metric_kd.losses.samplers import (
    SAMPLERS,
    AllPairs,
    DistanceWeighted,
    HardNegative,
    RandomNegative,
    SemiHardNegative,
)


def rows(n, d, dtype=torch.float64, seed=0):
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def as_list(triplets):
    return list(zip(*(t.tolist() for t in triplets), strict=True))


def test_names():
    assert {name: SAMPLERS[name] for name in SAMPLERS} == {
        "all": AllPairs,
        "random": RandomNegative,
        "hard": HardNegative,
        "semihard": SemiHardNegative,
        "distance": DistanceWeighted,
    }


@pytest.mark.parametrize("sampler", [AllPairs, HardNegative, SemiHardNegative])
def test_golden_triplets(sampler):
    pinned = case(f"rkd_sampler_{sampler.__name__}")
    ours = sampler()(pinned.inputs["embeddings"], pinned.inputs["labels"])
    for triplet, key in zip(ours, ("anchor", "pos", "neg"), strict=True):
        assert triplet.dtype == torch.int64 and torch.equal(triplet, pinned.outputs[key])


@pytest.mark.parametrize("name", ["rkd_distweighted_emb", "rkd_distweighted_emb_n"])
@pytest.mark.parametrize("reference_maximum", [False, True])
def test_golden_weights(name, reference_maximum):
    pinned = case(name)
    ours = DistanceWeighted(reference_maximum=reference_maximum).weights(**pinned.inputs)
    assert_close(ours, pinned.outputs["weight"])


@pytest.mark.parametrize("seed", range(5))
def test_oracles(seed):
    labels = torch.randint(0, 4, (14,), generator=torch.Generator().manual_seed(seed))
    x = rows(14, 3, seed=seed)
    assert as_list(AllPairs()(x, labels)) == oracles.all_triplets(labels.tolist())
    assert as_list(HardNegative()(x, labels)) == oracles.hard_triplets(x, labels.tolist())
    assert as_list(SemiHardNegative()(x, labels)) == oracles.semihard_triplets(x, labels.tolist())
    x[5] = x[2]
    expected = torch.tensor(oracles.distance_weights(x, labels.tolist()), dtype=torch.float64)
    assert_close(DistanceWeighted().weights(x, labels), expected, 1e-8)


def weights_with_masks(x, labels, reference_maximum):
    """The weights as they are written: selections by masks, distances instead of their squares."""
    n, width = x.shape
    distances = (Pairwise(unit_rows(x)).distances + torch.eye(n)).clamp(min=0.5)
    negatives = labels[:, None] != labels[None, :]
    log_weights = (2.0 - width) * distances.log() - (width - 3) / 2 * (1 - distances**2 / 4).clamp(min=1e-8).log()
    valid = negatives & (distances < 1.4)
    never = -float("inf")
    top = (log_weights if reference_maximum else log_weights.masked_fill(~valid, never)).amax(1, keepdim=True)
    weights = (log_weights - top.nan_to_num(neginf=0.0)).masked_fill(~valid, never).exp()
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, negatives.to(weights))
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("reference_maximum", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 16, 512])
def test_weights_are_those_of_the_masked_form(width, reference_maximum):
    x, labels = rows(24, width), torch.arange(24) % 5
    x[3], x[9] = x[4], -x[4]
    x[:12] += 2 * x[:1]  # near one another
    x[20] = 0
    expected = weights_with_masks(x, labels, reference_maximum)
    assert_close(DistanceWeighted(reference_maximum=reference_maximum).weights(x, labels), expected)
    one_class = DistanceWeighted(reference_maximum=reference_maximum).weights(x, torch.zeros(24))
    assert (one_class == 0).all()


@pytest.mark.parametrize("reference_maximum", [False, True])
def test_where_embeddings_are_not_finite_every_negative_is_as_likely(reference_maximum):
    x, labels = rows(12, 8), torch.arange(12) % 3
    x[5, 2] = float("nan")
    weights = DistanceWeighted(reference_maximum=reference_maximum).weights(x, labels)
    assert_close(weights, (labels[:, None] != labels[None, :]).double() / 8)


BAD_BATCHES = {
    "one class": (rows(6, 4), [1] * 6),
    "one sample per class": (rows(6, 4), list(range(6))),
    "one row": (rows(1, 4), [0]),
    "no rows": (rows(0, 4), []),
    "antipodal": (torch.cat([rows(4, 4), -rows(4, 4)]), [0, 0, 1, 1] * 2),
    "on a line": (torch.tensor([[1.0], [-1], [2], [-2]]), [0, 0, 1, 1]),
    "duplicates": (rows(2, 4).repeat(4, 1), [0, 0, 1, 1] * 2),
    "collapsed": (torch.ones(8, 4), [0, 0, 1, 1] * 2),
    "zeros": (torch.zeros(8, 4), [0, 0, 1, 1] * 2),
    "some zeros": (torch.cat([rows(4, 4), torch.zeros(4, 4)]), [0, 0, 1, 1] * 2),
    "huge": (rows(8, 4) * 1e4, [0, 0, 1, 1] * 2),
    "tiny": (rows(8, 4) * 1e-7, [0, 0, 1, 1] * 2),
    "wide": (rows(8, 600), [0, 0, 1, 1] * 2),
    "a row not finite": (torch.cat([rows(7, 4), torch.full((1, 4), float("nan"))]), [0, 0, 1, 1] * 2),
    "overflow": (torch.cat([rows(7, 4), torch.full((1, 4), float("inf"))]), [0, 0, 1, 1] * 2),
    "one without partner": (rows(5, 4), [0, 0, 1, 1, 2]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", BAD_BATCHES)
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_batch_gives_valid_triplets_or_none(name, batch, dtype):
    x, labels = BAD_BATCHES[batch][0].to(dtype), torch.tensor(BAD_BATCHES[batch][1], dtype=torch.int64)
    anchor, positive, negative = SAMPLERS[name]()(x, labels)
    assert anchor.dtype == positive.dtype == negative.dtype == torch.int64
    assert len(anchor) == len(positive) == len(negative)
    assert (anchor != positive).all()
    assert (labels[anchor] == labels[positive]).all() and (labels[anchor] != labels[negative]).all()
    expected = oracles.all_triplets(labels.tolist()) if name == "all" else oracles.positive_pairs(labels.tolist())
    enough_classes = len(labels.unique()) > 1
    assert len(anchor) == (len(expected) if enough_classes else 0)


def test_hard_takes_a_coincident_negative_only_for_want_of_another():
    x = torch.tensor([[0.0, 0], [1, 0], [0, 0], [3, 0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert HardNegative()(x, labels).negative[0] == 3
    assert HardNegative()(x[:3], labels[:3]).negative[0] == 2


def test_random_negatives_are_uniform():
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    counts = torch.zeros(7, 7)
    for _ in range(2000):
        anchor, _, negative = RandomNegative()(rows(7, 3), labels)
        counts.index_put_((anchor, negative), torch.ones(len(anchor)), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True)
    for a, j in itertools.product(range(7), range(7)):
        expected = 0 if labels[a] == labels[j] else 1 / (labels != labels[a]).sum().item()
        assert shares[a, j].item() == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("name", ["random", "distance"])
def test_the_ends_of_the_draw_stay_in_the_row(name, draw, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, draw, **options))
    for seed in range(10):
        x, labels = rows(30, 5, torch.float32, seed), torch.arange(10).repeat(3)
        anchor, _, negative = SAMPLERS[name]()(x, labels)
        assert (labels[anchor] != labels[negative]).all()
        if name == "distance":
            assert (DistanceWeighted().weights(x, labels)[anchor, negative] > 0).all()


def test_distance_draws_follow_the_weights():
    torch.manual_seed(0)
    pinned = case("rkd_distweighted_emb")
    x, labels = pinned.inputs["embeddings"], pinned.inputs["labels"]
    weights, counts = DistanceWeighted().weights(x, labels), torch.zeros(15, 15, dtype=torch.float64)
    for _ in range(2000):
        anchor, _, negative = DistanceWeighted()(x, labels)
        counts.index_put_((anchor, negative), torch.ones(len(anchor), dtype=torch.float64), accumulate=True)
    drawn = counts.sum(1) > 0
    shares = counts[drawn] / counts[drawn].sum(1, keepdim=True)
    assert (shares - weights[drawn]).abs().max() < 0.03
    assert (counts[weights == 0] == 0).all()


def test_at_512_dimensions_near_negatives_are_preferred_and_the_reference_draws_uniformly():
    """Tight classes: the weight of positives at the cut-off is so large that all negatives underflow beside it."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(8, 512, generator=generator), dim=1)
    centres[1] = torch.nn.functional.normalize(centres[0] + 0.9 * centres[1], dim=0)  # class 1 is near class 0
    x = centres.repeat_interleave(4, 0) + 0.25 / 512**0.5 * torch.randn(32, 512, generator=generator)
    labels = torch.arange(8).repeat_interleave(4)
    ours = DistanceWeighted().weights(x, labels)
    exact = torch.tensor(oracles.distance_weights(x, labels.tolist()))
    assert (ours - exact).abs().max() < 1e-3
    assert ours[:4, 4:8].sum(1).min() > 0.99
    reference = DistanceWeighted(reference_maximum=True).weights(x, labels)
    uniform = (labels[:, None] != labels[None, :]) / 28
    assert torch.allclose(reference[:8], uniform[:8])


def test_draws_repeat_with_the_global_seed_and_leave_no_gradient():
    x, labels = rows(12, 4).requires_grad_(), torch.arange(4).repeat(3)
    for name in SAMPLERS:
        draws = []
        for _ in range(2):
            torch.manual_seed(5)
            draws.append(SAMPLERS[name]()(x, labels))
        assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


def test_bad_arguments():
    with pytest.raises(UserError, match="one label per embedding"):
        AllPairs()(rows(3, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="cut_off"):
        DistanceWeighted(cut_off=2.0)
    with pytest.raises(UserError, match="did you mean 'semihard'"):
        SAMPLERS["semi_hard"]


def test_the_references_maximum_is_an_option_of_the_losses():
    from metric_kd.losses.objective import Objective, parse_loss

    term = Objective([parse_loss("l2_triplet:1,sample=distance,reference_maximum=true")]).terms["l2_triplet"]
    assert term.sampler.reference_maximum
    with pytest.raises(UserError, match="of the sampler 'distance'"):
        Objective([parse_loss("contrastive:1,sample=hard,reference_maximum=true")])
