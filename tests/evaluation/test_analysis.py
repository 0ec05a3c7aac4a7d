"""Linear CKA and the noise of the other classes: pinned numbers, plain formulas, and the command that writes them."""

import pytest
import torch
from pinned import arrays, assert_close

from metric_kd.errors import UserError
from metric_kd.evaluation.analysis import linear_cka, non_target_noise


def test_cka_equals_the_pinned_numbers():
    g = arrays("linear_cka")
    assert_close(linear_cka(g["X"], g["Y"]), g["cka"])
    assert_close(linear_cka(g["X"], g["X"]), g["cka_self"])


@pytest.mark.parametrize("n", [3, 30])
def test_cka_against_centred_kernels(n):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X', the definition; for more images than features and fewer."""
    torch.manual_seed(0)
    x, y = torch.randn(n, 5, dtype=torch.double) + 3, torch.randn(n, 7, dtype=torch.double)
    centre = torch.eye(n, dtype=torch.double) - 1 / n

    def hsic(a, b):
        return torch.trace(a @ a.T @ centre @ b @ b.T @ centre)

    wanted = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert linear_cka(x, y).item() == pytest.approx(wanted.item(), rel=1e-10)
    assert linear_cka(4 * x.flip(1) - 1, y).item() == pytest.approx(wanted.item(), rel=1e-10)


def test_cka_of_a_constant_is_zero_and_images_must_match():
    assert linear_cka(torch.ones(4, 2), torch.randn(4, 3)) == 0
    with pytest.raises(UserError, match="same images"):
        linear_cka(torch.zeros(3, 2), torch.zeros(4, 2))


def test_noise_equals_the_pinned_numbers():
    g = arrays("mgd_noise")
    assert_close(non_target_noise(g["logits"]), g["per_sample"])
    assert_close(non_target_noise(g["logits"]).mean(), g["mean"])


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_noise_of_any_number_of_classes(classes):
    torch.manual_seed(0)
    logits = torch.randn(5, classes, dtype=torch.double)
    for n, row in enumerate(logits.softmax(1)):
        others = sorted(row.tolist())[:-1]
        wanted = sum(abs(p - (1 - row.max().item()) / (classes - 1)) for p in others)
        assert non_target_noise(logits)[n].item() == pytest.approx(wanted, abs=1e-14)
    even = torch.zeros(1, classes).index_fill(1, torch.tensor([1]), 4.0)
    assert non_target_noise(even).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match="2 classes"):
        non_target_noise(torch.zeros(2, 1))
