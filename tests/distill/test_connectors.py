import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metric_kd.distill.connectors import LayerwiseTerm, Norm, connector, regressor
from metric_kd.distill.layers import paired_maps, paired_preacts, pool_to_smaller, same_shape
from metric_kd.errors import UserError
from metric_kd.types import Batch, Output

BATCH = Batch(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.arange(2))


def maps(channels, height, width=None, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, height, width or height, generator=generator)


def test_connector_only_where_widths_differ():
    assert isinstance(connector(maps(3, 4), maps(3, 2)), nn.Identity)
    kept = connector(maps(3, 4), maps(3, 4), always=True)
    assert [tuple(p.shape) for p in kept.parameters()] == [(3, 3, 1, 1), (3,), (3,)]
    layer = connector(maps(3, 4), maps(5, 2))
    assert [type(part) for part in layer] == [nn.Conv2d, Norm] and layer[0].bias is None
    assert layer(maps(3, 4)).shape == (2, 5, 4, 4) and (layer(maps(3, 4)) < 0).any()  # no activation
    bare = connector(maps(3, 4), maps(5, 2), norm=False)
    assert torch.equal(bare(maps(3, 4)), F.conv2d(maps(3, 4), bare[0].weight))
    rows = connector(torch.zeros(2, 3), torch.zeros(2, 5))
    assert isinstance(rows, nn.Linear) and rows.bias is None and rows(torch.zeros(2, 3)).shape == (2, 5)


def test_norm_trains_on_one_value_per_channel():
    ours, plain = Norm(3), nn.BatchNorm2d(3)
    assert torch.equal(ours(maps(3, 2)), plain(maps(3, 2))) and torch.equal(ours.running_var, plain.running_var)
    x = maps(3, 1, n=1).requires_grad_()
    ours(x).sum().backward()
    assert torch.equal(ours(x), plain.eval()(x)) and x.grad.abs().sum() > 0
    assert torch.equal(ours.running_mean, plain.running_mean)
    assert torch.equal(ours.eval()(maps(3, 2)), plain(maps(3, 2)))


def test_connector_starts_from_kaiming_fan_out():
    torch.manual_seed(0)
    layer = connector(maps(400, 1), maps(200, 1))
    assert layer[0].weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "ours, theirs, kind, kernel",
    [
        ((8, 8), (4, 4), nn.Conv2d, (3, 3)),
        ((4, 4), (8, 8), nn.ConvTranspose2d, (4, 4)),
        ((6, 6), (6, 6), nn.Conv2d, (1, 1)),
        ((7, 7), (5, 5), nn.Conv2d, (3, 3)),
        ((8, 6), (4, 6), nn.Conv2d, (5, 1)),
        ((8, 6), (4, 3), nn.Conv2d, (3, 3)),
        ((2, 2), (1, 1), nn.Conv2d, (3, 3)),
    ],
)
def test_regressor_leads_to_the_teachers_grid(ours, theirs, kind, kernel):
    student, teacher = maps(3, *ours), maps(5, *theirs)
    layer = regressor(student, teacher)
    assert [type(part) for part in layer] == [kind, Norm, nn.ReLU] and layer[0].kernel_size == kernel
    assert layer(student).shape == teacher.shape and (layer(student) >= 0).all()


def test_regressor_refuses_a_smaller_grid_that_is_not_half():
    for ours, theirs in (((4, 4), (6, 6)), ((4, 4), (4, 5)), ((4, 8), (8, 4))):
        with pytest.raises(UserError, match="connector=linear"):
            regressor(maps(3, *ours), maps(5, *theirs))


def test_pairs_are_the_last_maps_of_each():
    student = Output(maps=tuple(maps(c, 4) for c in (1, 2, 3, 4)), preacts=tuple(maps(c, 4) for c in (5, 6, 7, 8)))
    teacher = Output(maps=tuple(maps(c, 4) for c in (9, 10, 11, 12, 13)), preacts=tuple(maps(c, 4) for c in (1, 2)))

    def widths(pairs):
        return [(s.shape[1], t.shape[1]) for s, t in pairs]

    assert widths(paired_maps(student, teacher, ())) == [(2, 11), (3, 12), (4, 13)]
    assert widths(paired_maps(student, teacher, (), count=4)) == [(1, 10), (2, 11), (3, 12), (4, 13)]
    assert widths(paired_maps(student, teacher, (3, 0))) == [(4, 12), (1, 9)]
    assert widths(paired_preacts(student, teacher, ())) == [(7, 1), (8, 2)]
    assert widths(paired_preacts(student, teacher, (1,))) == [(6, 2)]
    with pytest.raises(UserError, match="stage 2, but the teacher has maps 0 to 1"):
        paired_preacts(student, teacher, (2,))
    with pytest.raises(UserError, match="the student gives no pre-activations"):
        paired_preacts(Output(), teacher, ())
    with pytest.raises(UserError, match="the teacher gives no pre-activations"):
        paired_preacts(student, None, ())


def test_pool_to_smaller_takes_each_side_by_itself():
    s, t = pool_to_smaller(maps(3, 8, 2), maps(5, 4, 4))
    assert s.shape == (2, 3, 4, 2) and t.shape == (2, 5, 4, 2)
    assert torch.equal(s, F.avg_pool2d(maps(3, 8, 2), (2, 1)))


def test_same_shape():
    same_shape("ab", maps(3, 4), maps(3, 4))
    for wrong in (maps(2, 4), maps(3, 2)):
        with pytest.raises(UserError, match="--loss ab"):
            same_shape("ab", maps(3, 4), wrong)
    with pytest.raises(UserError, match="N, C, H, W"):
        same_shape("ab", torch.zeros(2, 3), torch.zeros(2, 3))


def test_layerwise_term_compares_each_stage_through_its_own_connector():
    seen = []

    class Gap(LayerwiseTerm):
        def compare(self, level, student, teacher):
            seen.append((level, tuple(student.shape), tuple(teacher.shape), student.dtype))
            return (student.mean() - teacher.mean()).abs() + level

    student = Output(maps=(maps(3, 8), maps(4, 4).half()))
    teacher = Output(maps=(maps(5, 4), maps(4, 4, seed=1)))
    term = Gap()
    term.build(student, teacher, 2)
    loss = term(student, teacher, BATCH)
    assert seen == [
        (0, (2, 5, 4, 4), (2, 5, 4, 4), torch.float32),
        (1, (2, 4, 4, 4), (2, 4, 4, 4), torch.float32),
    ]
    assert loss.ndim == 0 and loss >= 0.5 and len(list(term.parameters())) == 3
    only = Gap(layers="1")
    only.build(student, teacher, 2)
    assert len(only.connectors) == 1 and not list(only.parameters())
