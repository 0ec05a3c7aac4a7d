"""The learning rate is a pure function of the position."""

import numpy as np
import pytest
import torch

from metric_kd.engine.optimisation import OPTIMIZERS, Settings, learning_rate, make_optimizer


def test_a_milestone_takes_effect_in_its_own_epoch_as_in_the_seed():
    settings = Settings(epochs=40, iterations=10, lr=1.0, lr_decay_epochs=(25, 30, 35), lr_decay_gamma=0.5)
    rates = [learning_rate(settings, epoch, 0) for epoch in (1, 24, 25, 29, 30, 35, 40)]
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.125, 0.125]
    # the reference: MultiStepLR stepped before each epoch
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [25, 30, 35], 0.5)
    optimizer.step()
    for epoch in range(1, 41):
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(settings, epoch, 3))


def test_cosine_and_warmup():
    settings = Settings(epochs=4, iterations=10, lr=2.0, schedule="cosine", warmup=1)
    rates = [learning_rate(settings, epoch, k) for epoch in range(1, 5) for k in range(10)]
    assert 0 < rates[0] < rates[5] < rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[25] == pytest.approx(1.0) and 0 < rates[-1] < 0.02


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_fused(name):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(Settings(epochs=1, iterations=1, lr=0.1, optimizer=name), [parameter])
    assert optimizer.defaults["fused"] and type(optimizer).__name__.lower() == name


def test_log_steps_evenly_in_the_exponent():
    settings = Settings(epochs=150, iterations=10, lr=1e-2, schedule="log", lr_decay_gamma=0.1)
    rates = [learning_rate(settings, epoch, k) for epoch in range(1, 151) for k in (0, 9)]
    assert rates[::2] == rates[1::2], "one rate an epoch"
    assert rates[::2] == pytest.approx(np.logspace(-2, -3, 150))
    warmed = Settings(epochs=6, iterations=4, lr=1.0, schedule="log", lr_decay_gamma=0.01, warmup=1.5)
    rates = [learning_rate(warmed, epoch, k) for epoch in range(1, 7) for k in range(4)]
    assert rates[:6] == sorted(rates[:6]) and rates[5] < 1
    assert [rates[k] for k in (6, 8, 12, 16, 20)] == pytest.approx([1, 1, 0.01 ** (1 / 3), 0.01 ** (2 / 3), 0.01])
    assert learning_rate(Settings(epochs=1, iterations=1, lr=0.5, schedule="log"), 1, 0) == 0.5
