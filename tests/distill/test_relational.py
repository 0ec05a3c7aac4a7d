import oracles
import pytest
import torch
from largest import LargestTensor
from pinned import assert_close, case
from torch.autograd import gradcheck
from torch.nn.functional import smooth_l1_loss
from torch.utils._python_dispatch import TorchDispatchMode

from metric_kd import distances as distances_module
from metric_kd.distances import Pairwise, sharing
from metric_kd.distill.relational import rkd_angle as angle_module
from metric_kd.distill.relational import rkd_distance as distance_module
from metric_kd.errors import UserError
from metric_kd.functional import dark_rank, irg_edge, rkd_angle, rkd_distance
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.losses.term import TERMS
from metric_kd.losses.triplet import l2_triplet_all
from metric_kd.types import Batch, Output

LOSSES = {"rkd_distance": rkd_distance, "rkd_angle": rkd_angle, "dark_rank": dark_rank}


def rows(n, d, dtype=torch.float64, seed=0):
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(loss, student, teacher, **options):
    x = student.clone().requires_grad_()
    value = loss(x, teacher, **options)
    value.backward()
    return value.detach(), x.grad


@pytest.fixture(params=[2**17, 40, 7, 1])
def tile(request, monkeypatch):
    """Angle tiles of several sizes: the whole batch, some anchors, part of one anchor, one row."""
    monkeypatch.setenv("METRIC_KD_KERNELS", "off")
    monkeypatch.setitem(angle_module.TILE, "cpu", request.param)


GOLDEN = {
    "rkd_dist": (rkd_distance, {}),
    "rkd_angle": (rkd_angle, {}),
    "zoo_rkd_dist": (rkd_distance, {}),
    "zoo_rkd_angle": (rkd_angle, {}),
    "rkd_harddark_a2_b3": (dark_rank, {"alpha": 2, "beta": 3}),
    "rkd_harddark_a3_b3": (dark_rank, {"alpha": 3, "beta": 3}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    pinned, (loss, options) = case(name), GOLDEN[name]
    value, gradient = run(loss, *pinned.inputs.values(), **options)
    assert_close(value, pinned.outputs["loss"])
    assert_close(gradient, next(v for k, v in pinned.outputs.items() if k.startswith("grad_")))


def test_golden_weighted_sum_of_both():
    pinned = case("zoo_rkd_25_50")
    with sharing():
        value, gradient = run(lambda s, t: 25 * rkd_distance(s, t) + 50 * rkd_angle(s, t), *pinned.inputs.values())
    assert_close(value, pinned.outputs["loss"])
    assert_close(gradient, pinned.outputs["grad_feat_s"])


@pytest.mark.parametrize("n", [3, 4, 7])
def test_angle_oracle(n, tile):
    student, teacher = rows(n, 3), rows(n, 5, seed=1)
    if n == 7:
        student[5], teacher[4] = student[2], teacher[0]  # coincident, each in one network only
    oracle = oracles.rkd_angle(student, teacher)
    assert_close(rkd_angle(student, teacher), oracle)
    assert_close(run(rkd_angle, student, teacher)[0], oracle)


def test_angle_gradient_in_tiles(tile):
    student, teacher = rows(9, 4), rows(9, 6, seed=1)
    value, gradient = run(rkd_angle, student, teacher)
    expected, expected_gradient = run(oracles.rkd_angle_plain, student, teacher)
    assert_close(value, expected, 1e-12)
    assert_close(gradient, expected_gradient, 1e-12)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_distance_oracle(n):
    student, teacher = rows(n, 3), rows(n, 5, seed=1)
    teacher[-1] *= 10  # gaps above one: the linear part of the Huber function
    assert_close(rkd_distance(student, teacher), oracles.rkd_distance(student, teacher)) if n > 2 else None
    value, gradient = run(rkd_distance, student, teacher)
    assert n > 2 or (value.abs() < 1e-15 and gradient.abs().max() < 1e-15)  # two rows always agree


def distance_by_autograd(student, teacher):
    """The loss as it is written, differentiated step by step."""
    ours, theirs = Pairwise(student).distances, Pairwise(teacher).distances
    pairs = len(ours) ** 2 - len(ours)
    return smooth_l1_loss(ours / (ours.sum() / pairs), theirs / (theirs.sum() / pairs))


def dark_rank_by_autograd(student, teacher):
    nearest = Pairwise(teacher).distances.clone().fill_diagonal_(float("inf")).topk(4, 1, largest=False).indices
    scores = -2.0 * Pairwise(student).distances.gather(1, nearest).pow(3.0)
    return (scores.flip(1).logcumsumexp(1).flip(1) - scores).sum(1).mean()


@pytest.mark.parametrize("alike", ["nothing", "in both", "in the student", "in the teacher"])
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize(
    "loss, by_autograd", [(rkd_distance, distance_by_autograd), (dark_rank, dark_rank_by_autograd)]
)
def test_closed_gradients_are_those_of_autograd(loss, by_autograd, alike, spread):
    student, teacher = rows(23, 4), rows(23, 6, seed=1)
    teacher[-3:] *= spread  # gaps above one: the linear part of the Huber function
    if alike in ("in both", "in the student"):
        student[3] = student[8]
    if alike in ("in both", "in the teacher"):
        teacher[3] = teacher[8]
    (value, gradient), (expected, expected_gradient) = (run(f, student, teacher) for f in (loss, by_autograd))
    assert_close(value, expected, 1e-12)
    assert_close(gradient, expected_gradient, 1e-12)


@pytest.mark.parametrize("size", [1, 40, 2**17])
def test_distance_in_tiles(size, monkeypatch):
    monkeypatch.setattr(distance_module, "TILE", size)
    student, teacher = rows(9, 4), rows(9, 6, seed=1)
    for ours, expected in zip(*(run(f, student, teacher) for f in (rkd_distance, distance_by_autograd)), strict=True):
        assert_close(ours, expected, 1e-12)


@pytest.mark.parametrize(
    "loss, by_autograd", [(rkd_distance, distance_by_autograd), (dark_rank, dark_rank_by_autograd)]
)
def test_large_batches_in_float32_keep_their_digits(loss, by_autograd, monkeypatch):
    monkeypatch.setattr(distances_module, "LARGE", 16)
    monkeypatch.setattr(distances_module, "STRIP", 24)
    student, teacher = rows(60, 16) / 4, rows(60, 24, seed=1)  # lengths about 1: DarkRank cubes distances
    student[3], student[20:24] = student[8], student[30:34] + 1e-3 * student[40:44]
    student, teacher = student.float(), teacher.float()
    assert distances_module._in_single_precision(student) is not None
    (value, gradient), (expected, expected_gradient) = (
        run(loss, student, teacher),
        run(by_autograd, student.double(), teacher.double()),
    )
    assert_close(value.double(), expected, 1e-6)
    assert_close(gradient.double(), expected_gradient, 1e-5)


class MatrixProducts(TorchDispatchMode):
    """How many matrix products were taken in which more than ``n``^2 multiplications meet."""

    n, count = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1] > self.n**2
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("symmetric", [True, False])
def test_losses_that_share_distances_take_three_or_four_products_in_all(symmetric):
    """One for each network's distances, and one for the gradient of all losses whose gradients are symmetric in them, one
    for that of all others.
    """
    student, teacher, labels = rows(16, 40).requires_grad_(), rows(16, 50, seed=1), torch.arange(16) // 4
    losses = [rkd_distance, rkd_angle]
    if not symmetric:
        losses += [dark_rank, irg_edge, lambda s, t: l2_triplet_all(s, labels)]
    separately = sum(torch.autograd.grad(loss(student, teacher), student)[0] for loss in losses)
    with MatrixProducts() as products, sharing():
        products.n = 16
        sum(loss(student, teacher) for loss in losses).backward()
    assert products.count == (3 if symmetric else 4)
    assert_close(student.grad, separately, 1e-12)


def test_terms_of_an_objective_share_distances():
    objective = Objective(
        [parse_loss(name) for name in ("rkd", "rkd_distance", "rkd_angle", "dark_rank", "l2_triplet")]
    )
    student, teacher = (Output(embedding=rows(16, d, seed=d)) for d in (40, 50))
    labels = torch.arange(16) // 4
    student.embedding.requires_grad_()
    with MatrixProducts() as products:
        products.n = 16
        objective(student, teacher, Batch(torch.zeros(16, 3, 8, 8), labels, labels))[0].backward()
    assert products.count == 4


@pytest.mark.parametrize("n, list_length", [(3, 4), (4, 4), (9, 4), (9, 2), (9, 20)])
def test_dark_rank_oracle(n, list_length):
    student, teacher = rows(n, 3), rows(n, 5, seed=1)
    ours = run(dark_rank, student, teacher, alpha=1.5, beta=2, list_length=list_length)[0]
    assert_close(ours, oracles.dark_rank(student, teacher, 1.5, 2, list_length))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [3, 6])
def test_gradcheck(name, n):
    teacher = rows(n, 5, seed=1)
    assert gradcheck(lambda s: LOSSES[name](s, teacher), rows(n, 3).requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_small_batches_are_finite_and_differentiable(name, n, dtype):
    value, gradient = run(LOSSES[name], rows(n, 4, dtype), rows(n, 6, dtype, seed=1))
    assert value.shape == () and value.isfinite() and gradient.shape == (n, 4) and gradient.isfinite().all()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
    if n < 2 or (n == 2 and name != "rkd_distance"):
        assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_rkd_does_not_see_scale_rotation_and_translation(name):
    student, teacher = rows(8, 5), rows(8, 7, seed=1)
    rotation = torch.linalg.qr(rows(5, 5, seed=2)).Q
    moved = 3.7 * student @ rotation + rows(1, 5, seed=3)
    assert_close(LOSSES[name](moved, 0.2 * teacher + 1), LOSSES[name](student, teacher), 1e-10)
    assert LOSSES[name](moved, student) < 1e-20
    assert LOSSES[name](student, teacher) > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_teacher(name):
    student, teacher = rows(6, 3).requires_grad_(), rows(6, 3, seed=1).requires_grad_()
    LOSSES[name](student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    with sharing():  # the student's own tensor as a teacher: the shared matrix must still be cut on that side
        x = rows(6, 3).requires_grad_()
        ours = torch.autograd.grad(LOSSES[name](x, x), x)[0]
    y = rows(6, 3).requires_grad_()
    assert torch.allclose(ours, torch.autograd.grad(LOSSES[name](y, y.detach()), y)[0])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_are_finite(name, dtype):
    student, teacher = rows(12, 5, dtype), rows(12, 7, dtype, seed=1)
    student[3] = student[8]
    value, gradient = run(LOSSES[name], student, teacher)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 100
    teacher[3] = teacher[8]
    value, gradient = run(LOSSES[name], student, teacher)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 100
    value, gradient = run(LOSSES[name], torch.ones_like(student), teacher)
    assert value.isfinite() and (gradient == 0).all()


def test_duplicates_in_both_networks_equal_the_reference_formula():
    student, teacher = rows(10, 5), rows(10, 7, seed=1)
    student[3], teacher[3] = student[8], teacher[8]
    value, gradient = run(rkd_angle, student, teacher)
    expected, expected_gradient = run(oracles.rkd_angle_plain, student, teacher)
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)


def test_duplicates_in_the_student_only_where_the_reference_explodes():
    student, teacher = rows(10, 5), rows(10, 7, seed=1)
    student[3] = student[8]
    value, gradient = run(rkd_angle, student, teacher)
    expected, exploded = run(oracles.rkd_angle_plain, student, teacher)
    assert_close(value, expected)
    others = [i for i in range(10) if i not in (3, 8)]
    assert_close(gradient[others], exploded[others])
    assert exploded.abs().max() > 1e3 and gradient.abs().max() < 1


@pytest.mark.parametrize("gap, tolerance", [(1.0, 1e-6), (1e-2, 1e-4), (1e-3, 1e-3)])
def test_angle_in_float32_keeps_close_pairs(gap, tolerance):
    student, teacher = rows(40, 16), rows(40, 24, seed=1)
    student[3] = student[8] + gap * rows(1, 16, seed=2) / 4
    student, teacher = student.float(), teacher.float()
    exact_value, exact = run(oracles.rkd_angle_plain, student.double(), teacher.double())
    value, gradient = run(rkd_angle, student, teacher)
    assert_close(value.double(), exact_value, 1e-5)
    assert_close(gradient.double(), exact, tolerance)


def test_angle_makes_no_large_tensor(monkeypatch):
    monkeypatch.setenv("METRIC_KD_KERNELS", "off")
    monkeypatch.setitem(angle_module.TILE, "cpu", 2**10)
    student, teacher = rows(48, 32), rows(48, 32, seed=1)
    with LargestTensor() as ours:
        run(rkd_angle, student, teacher)
    assert ours.elements == 48 * 48
    with LargestTensor() as plain:
        run(oracles.rkd_angle_plain, student, teacher)
    assert plain.elements == 48 * 48 * 48


def test_angle_skips_the_gradient_where_none_is_wanted(monkeypatch):
    student, teacher = rows(9, 4), rows(9, 6, seed=1)
    expected = rkd_angle(student.clone().requires_grad_(), teacher).detach()
    wanted = []
    real = angle_module.angle_gap

    def spy(u, v, want_gradient=True):
        wanted.append(want_gradient)
        return real(u, v, want_gradient)

    monkeypatch.setattr(angle_module, "angle_gap", spy)
    assert_close(rkd_angle(student, teacher), expected, 1e-12)
    with torch.no_grad():
        assert_close(rkd_angle(student.clone().requires_grad_(), teacher), expected, 1e-12)
    rkd_angle(student.clone().requires_grad_(), teacher)
    assert wanted == [False, False, True]


@pytest.mark.parametrize("name", LOSSES)
def test_accepts_pairwise_and_shares_it(name):
    student, teacher = rows(6, 3), rows(6, 5, seed=1)
    expected = LOSSES[name](student, teacher)
    assert torch.equal(LOSSES[name](Pairwise(student), Pairwise(teacher)), expected)
    with sharing():
        first = Pairwise.of(student)
        LOSSES[name](student, teacher)
        assert "_found" in vars(first)


@pytest.mark.parametrize("name", LOSSES)
def test_terms(name):
    student, teacher = rows(6, 3, torch.float32), rows(6, 5, torch.float32, seed=1)
    term = TERMS[name]()
    assert term.reads_teacher and term.family == "relational" and term.needs == ("embedding",) and term.paper
    batch = Batch(torch.zeros(6, 3, 1, 1, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64), torch.arange(6))
    expected = LOSSES[name](student, teacher)
    assert torch.equal(term(Output(embedding=student), Output(embedding=teacher), batch), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term(Output(embedding=student), Output(embedding=teacher), batch)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert term(Output(embedding=student.bfloat16()), Output(embedding=teacher), batch).dtype == torch.float32


def test_not_finite_embeddings_are_not_hidden():
    student, teacher = rows(6, 3), rows(6, 3, seed=1)
    student[2, 0] = float("nan")
    for loss in LOSSES.values():
        assert loss(student, teacher).isnan()


def test_bad_input():
    for loss in LOSSES.values():
        with pytest.raises(UserError, match="same images; got 4 and 5"):
            loss(rows(4, 3), rows(5, 3))
    for options in ({"alpha": 0.0}, {"beta": -1.0}, {"list_length": 1}):
        with pytest.raises(UserError, match="dark_rank needs"):
            TERMS["dark_rank"](**options)
