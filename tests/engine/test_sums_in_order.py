"""A step repeats itself bit for bit on several threads too, also where gradients of gathered rows are summed."""

import pytest
import torch
from small_steps import CPU, batch, gradients, task

from metric_kd.engine.reproducibility import sums_in_order
from metric_kd.losses.term import TERMS, Term

COUNT = 6000
"""Rows that are gathered: PyTorch takes several threads from 32,768 numbers on."""


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(n, seed=0):
    return torch.randint(0, n, (COUNT * 8,), generator=torch.Generator().manual_seed(seed))


GATHERED = {
    "rows": lambda x: x[rows(64)[:COUNT]] * draw(COUNT, 64),
    "pairs": lambda x: x[rows(64), rows(64, 1)] * draw(COUNT * 8),
    "columns": lambda x: x[:, rows(64)[:COUNT]] * draw(64, COUNT),
    "take": lambda x: x.flatten().take(rows(64 * 64)) * draw(COUNT * 8),
    "mask": lambda x: x.repeat(20, 1)[draw(1280, 64) > 0] * 1.5,
}


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)


@pytest.mark.parametrize("case", GATHERED)
def test_gradients_of_what_is_gathered_repeat_themselves(case, two_threads):
    found = []
    for _ in range(5):
        x = draw(64, 64).requires_grad_()
        with sums_in_order(CPU):
            GATHERED[case](x).sum().backward()
        found.append(x.grad)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_step_with_a_loss_that_gathers_repeats_itself(two_threads):
    class Gathering(Term):
        def forward(self, student, teacher, batch):
            n = len(student.embedding)
            return (student.embedding[rows(n)] - student.embedding[rows(n, 1)]).pow(3).abs().mean()

    TERMS.register("gathering")(Gathering)
    try:
        first, *others = (gradients(task("gathering:1", dtype=torch.float32), batch(1)) for _ in range(4))
    finally:
        del TERMS._entries["gathering"]
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


def test_what_was_set_before_is_set_after():
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError), sums_in_order(CPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        raise ValueError
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    with sums_in_order(torch.device("cuda")):
        assert not torch.are_deterministic_algorithms_enabled(), "there it is what --deterministic asks for"
    torch.use_deterministic_algorithms(True)
    try:
        with sums_in_order(CPU):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
