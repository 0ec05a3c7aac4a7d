import pytest
import torch

from metric_kd.deploy.bridge import bridge_from, fit_bridge
from metric_kd.errors import UserError


def spaces(n=60, d=5, e=8, noise=0.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(n, d, generator=draw) * torch.arange(1, d + 1) + 3
    weight = torch.randn(d, e, generator=draw)
    return student, (student - 3) @ weight + 7 + noise * torch.randn(n, e, generator=draw)


def test_a_linear_relation_is_found():
    student, teacher = spaces()
    torch.testing.assert_close(fit_bridge(student, teacher)(student), teacher, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.5, 20.0])
def test_ridge_is_the_minimum_of_its_loss(strength):
    student, teacher = (x.double() for x in spaces(noise=2.0))
    bridge = fit_bridge(student, teacher, strength=strength)
    unit = (student - student.mean(0)).square().sum() / student.shape[1]

    def loss(weight, shift):
        gap = (student - student.mean(0)) @ weight + shift - teacher
        return gap.square().sum() + strength * unit * weight.square().sum()

    weight, shift = (x.double().requires_grad_() for x in (bridge.weight, bridge.shift))
    best = loss(weight, shift)
    slopes = torch.autograd.grad(best, (weight, shift))
    assert max(slope.abs().max() for slope in slopes) < 1e-5 * best.item()


def test_the_strength_is_chosen_by_generalised_cross_validation():
    student, teacher = (x.double() for x in spaces(n=12, d=8, noise=30.0))
    ours, theirs = student - student.mean(0), teacher - teacher.mean(0)
    unit = ours.square().sum() / 8

    def error(strength):
        hat = ours @ torch.linalg.solve(ours.T @ ours + strength * unit * torch.eye(8, dtype=torch.float64), ours.T)
        return (theirs - hat @ theirs).square().sum() / (12 - hat.trace()) ** 2

    best = min((10.0**k for k in range(-6, 2)), key=error)
    assert best > 1e-6  # noise: the weakest is not the best
    chosen, same = fit_bridge(student, teacher), fit_bridge(student, teacher, strength=best)
    assert torch.equal(chosen.weight, same.weight)


def test_procrustes_keeps_the_order_of_neighbours_and_finds_a_rotation():
    student, _ = spaces()
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3))).Q[:5]
    teacher = 0.3 * student @ turn + 1
    bridge = fit_bridge(student, teacher, "procrustes")
    torch.testing.assert_close(bridge(student), teacher, atol=1e-4, rtol=1e-4)
    noisy = fit_bridge(student, teacher + torch.randn(60, 8), "procrustes")
    before, after = ((x[:, None] - x).norm(dim=2) for x in (student.double(), noisy(student).double()))
    torch.testing.assert_close(after / after.max(), before / before.max(), atol=1e-4, rtol=1e-3)


def test_it_survives_a_checkpoint(tmp_path):
    student, teacher = spaces()
    bridge = fit_bridge(student, teacher)
    torch.save(bridge.state(), tmp_path / "x.pth")
    again = bridge_from(torch.load(tmp_path / "x.pth", weights_only=True))
    assert torch.equal(again(student), bridge(student)) and again.kind == "ridge"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t: (s, t, "cubic"), "unknown bridge 'cubic'"),
        (lambda s, t: (s[:5], t), "the same two or more images"),
        (lambda s, t: (s[:1], t[:1]), "the same two or more images"),
        (lambda s, t: (s * float("nan"), t), "not finite"),
        (lambda s, t: (s, t, "ridge", -1.0), "give 0 or more"),
    ],
)
def test_wrong_arguments(change, words):
    with pytest.raises(UserError, match=words):
        fit_bridge(*change(*spaces()))


def test_another_student_is_refused():
    student, teacher = spaces()
    with pytest.raises(UserError, match="length 5, got 8"):
        fit_bridge(student, teacher)(teacher)


def test_constant_embeddings_give_the_mean():
    teacher = spaces()[1]
    for kind in ("ridge", "procrustes"):
        there = fit_bridge(torch.ones(60, 5), teacher, kind)(torch.ones(2, 5))
        torch.testing.assert_close(there, teacher.mean(0).expand(2, -1))


@pytest.mark.parametrize("n", [9, 12, 40])
def test_the_strength_is_that_of_leaving_images_out_however_few_there_are(n):
    student, teacher = (x.double() for x in spaces(n=n, d=12, noise=100.0))
    strengths = [10.0**k for k in range(-6, 2)]
    unit = (student - student.mean(0)).square().sum() / 12

    def missed(strength):
        total = 0.0
        for k in range(n):
            ours, theirs = (torch.cat([x[:k], x[k + 1 :]]) for x in (student, teacher))
            mean, shift = ours.mean(0), theirs.mean(0)
            square = (ours - mean).T @ (ours - mean) + strength * unit * torch.eye(12, dtype=torch.float64)
            weight = torch.linalg.solve(square, (ours - mean).T @ (theirs - shift))
            total += ((student[k] - mean) @ weight + shift - teacher[k]).square().sum()
        return float(total)

    errors = [missed(strength) for strength in strengths]
    chosen = fit_bridge(student, teacher).weight
    found = next(
        k for k, s in enumerate(strengths) if torch.equal(chosen, fit_bridge(student, teacher, strength=s).weight)
    )
    assert errors[found] < 1.2 * min(errors) < errors[0]


def test_the_scale_of_a_rotation_into_fewer_numbers_is_least_squares():
    teacher, student = (x.double() for x in spaces(noise=5.0))  # 8 numbers into 5
    bridge = fit_bridge(student, teacher, "procrustes")
    centred, weight = student - student.mean(0), bridge.weight.double()

    def missed(scale):
        return float((centred @ weight * scale - (teacher - teacher.mean(0))).square().sum())

    assert missed(1.0) < min(missed(0.98), missed(1.02))
