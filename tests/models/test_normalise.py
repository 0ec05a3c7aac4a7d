"""Normalisation by rows in lent memory: the same bits as pixel by pixel, and memory that nobody loses."""

import copy
import gc
import threading

import numpy as np
import pytest
import torch

from metric_kd.models import network as module
from metric_kd.models.backbone import Pixels
from metric_kd.models.lent_memory import ALIGNED, LentMemory
from metric_kd.models.network import NetworkSpec, build_network


@pytest.fixture
def memory(monkeypatch):
    fresh = LentMemory()
    monkeypatch.setattr(module, "_MEMORY", fresh)
    return fresh


def network(**pixels):
    return build_network(NetworkSpec("resnet8_x0.5", 8, pixels=Pixels(**pixels) if pixels else None))


def images(count=2, height=5, width=7, seed=0):
    """uint8 in channels_last, as loaders give them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, height, width, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)


def pixel_by_pixel(net, x):
    p = net.spec.pixels
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (p.mean, p.std))
    x = x.flip(1) if p.bgr else x
    return torch.addcmul((-mean / std).float(), x.float(), (p.scale / 255 / std).float())


@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 16, 21, 32, 63, 224])
def test_the_bits_are_those_of_one_formula_in_every_width_and_layout(memory, width):
    """The tail of a row is computed by other instructions than its body."""
    for net in (network(), network(mean=(0.1, 0.2, 0.3), std=(0.3, 0.7, 1.1), scale=255.0, bgr=True)):
        x = images(3, 4, width)
        found = net.normalise(x)
        assert torch.equal(found, pixel_by_pixel(net, x)) and found.stride() == x.stride()
        assert torch.equal(net.normalise(x.contiguous()), found)
        assert torch.equal(net.normalise(x[::2]), found[::2])


def test_every_value_of_a_pixel(memory):
    net = network()
    x = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3).permute(0, 3, 1, 2)
    p = net.spec.pixels
    mean, std = np.array(p.mean).reshape(3, 1, 1), np.array(p.std).reshape(3, 1, 1)
    exact = (x[0].double().numpy() * p.scale / 255 - mean) / std
    np.testing.assert_allclose(net.normalise(x)[0].numpy(), exact, rtol=1e-6, atol=1e-6)


def test_a_tensor_that_is_still_needed_is_never_written_to(memory):
    net = network()
    kept = [(x, net.normalise(x)) for x in (images(seed=seed) for seed in range(5))]
    view = net.normalise(images(seed=9))[0, 1]
    expected = view.clone()
    for seed in range(10, 15):
        net.normalise(images(seed=seed))
    assert all(torch.equal(found, pixel_by_pixel(net, x)) for x, found in kept)
    assert torch.equal(view, expected), "a view keeps the memory as well"


def test_gradients_of_two_forward_passes_before_one_backward(memory):
    """The first layer keeps its input for the gradient of its weights."""
    net = network()
    batches = [images(4, 32, 32, seed) for seed in range(3)]

    def gradient(net, xs):
        net.zero_grad()
        sum(net(x).embedding.pow(3).sum() for x in xs).backward()
        return [p.grad.clone() for p in net.parameters()]

    net.eval()
    together = gradient(net, batches)
    alone = [gradient(net, [x]) for x in batches]
    for k, total in enumerate(together):
        torch.testing.assert_close(total, sum(one[k] for one in alone))


def test_memory_is_used_again_once_it_is_free(memory):
    net = network()
    first = net.normalise(images())
    place = first.data_ptr()
    assert place % ALIGNED == 0
    second = net.normalise(images())
    assert second.data_ptr() != place
    del first
    assert net.normalise(images()).data_ptr() == place
    del second
    gc.collect()
    assert len(memory._free) == 2
    for count in (3, 8, 20, 50):
        net.normalise(images(count))
    assert len(memory._free) == memory.kept


def test_too_large_and_too_small_pieces_are_not_kept():
    memory = LentMemory(kept=2, largest=400)
    assert memory.empty((101,)).shape == (101,) and not memory._free
    assert memory.empty((0, 3)).shape == (0, 3) and not memory._free
    memory.empty((10, 10))
    assert len(memory._free) == 1
    small = memory.empty((10,))
    assert len(memory._free) == 1, "a small tensor does not hold a large piece"
    assert small.shape == (10,)


def test_threads_do_not_share_memory(memory):
    net, wrong = network(), []

    def work(seed):
        for k in range(50):
            x = images(2, 8, 8, 100 * seed + k)
            found = net.normalise(x)
            if not torch.equal(found, pixel_by_pixel(net, x)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_copies_and_half_types(memory):
    net = network()
    x = images()
    with torch.inference_mode():
        net.normalise(x)
    assert torch.equal(copy.deepcopy(net).normalise(x), pixel_by_pixel(net, x))
    assert net.normalise(x).is_inference() is False
    assert copy.deepcopy(net).double().normalise(x).dtype == torch.float64
    assert copy.deepcopy(net).bfloat16().normalise(x).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_tracing_sees_the_arithmetic(memory):
    """A traced network must not contain the borrowed memory as a constant."""
    net = network().eval()
    x, other = images(1, 32, 32, 0), images(1, 32, 32, 1)
    traced = torch.jit.trace(lambda batch: net.normalise(batch), x)
    assert torch.equal(traced(other), pixel_by_pixel(net, other))
