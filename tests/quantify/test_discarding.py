"""Information discarding: the reference's numbers, the search against a plain loop, and what must not matter."""

import math

import pytest
import torch
from pinned import arrays, assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.errors import UserError
from metric_kd.quantify import Search, entropy, information_discarding


def toy():
    """The pinned feature, image and search, and a source that hands out the pinned noise in its order."""
    pinned = arrays("sigma_toy")
    noise = iter(pinned["eps"])
    search = Search(grid=4, iterations=4, draws=5, lam=pinned["lam"].item(), lr=pinned["lr"].item())

    def feature(images: Tensor) -> Tensor:
        return F.conv2d(images, pinned["conv_w"], pinned["conv_b"], stride=2, padding=1)

    return pinned, feature, search, lambda rows: next(noise)[None]


@pytest.mark.parametrize("batch", [512, 2])
def test_the_pinned_search(batch):
    pinned, feature, search, noise = toy()
    found = information_discarding(feature, pinned["x"], search, noise=noise, batch=batch)
    assert_close(found.unit, pinned["sigma_f"][None])
    assert_close(found.history.change[:, 0], pinned["feature_loss"])
    assert_close(found.history.entropy[:, 0], pinned["mean_entropy"])
    assert_close(found.history.change[:, 0] - 7 * found.history.entropy[:, 0], pinned["loss"])
    assert_close(found.history.sigma, pinned["sigma_per_step"][:, 0])
    steps = (found.history.sigma[:-1] - found.history.sigma[1:]) / pinned["lr"]
    assert_close(steps, pinned["grad_per_step"][:-1, 0], 1e-7)  # a difference of sigmas divided by 1e-4


def test_the_step_after_the_last_is_the_pinned_one():
    pinned, feature, search, _ = toy()
    more = iter([*pinned["eps"], pinned["eps"][0]])
    longer = Search(grid=4, iterations=5, draws=5, lam=search.lam, lr=search.lr)
    found = information_discarding(feature, pinned["x"], longer, noise=lambda rows: next(more)[None])
    assert_close(found.history.sigma[4], pinned["sigma_after"][0])


def test_pinned_entropy():
    pinned = arrays("sigma_entropy")
    assert_close(entropy(pinned["sigma"]), pinned["H"])
    assert entropy(torch.tensor(0.01, dtype=torch.float64)).item() == pytest.approx(-3.18623, abs=1e-5)


def test_the_history_is_no_view_of_the_present():
    """In the reference every entry of the history is the last sigma, for on a CPU they share their memory."""
    pinned, feature, search, noise = toy()
    history = information_discarding(feature, pinned["x"], search, noise=noise).history
    for step in range(1, search.iterations):
        assert not torch.equal(history.sigma[step - 1], history.sigma[step])
    assert_close(entropy(history.sigma).mean((2, 3)), history.entropy)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, 2), nn.Flatten(1)
    )
    layers(torch.randn(16, 3, 9, 9))
    return layers.double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


QUICK = Search(grid=3, iterations=9, check=6, draws=6, lr=1e-5, target=-3.0)


def plain(feature, image: Tensor, search: Search, draws: list[Tensor], scale=1.0):
    """One image by autograd and a loop over draws and pixels: (unit, chosen, [sigma], [level])."""
    side = image.shape[-1]

    def spread(sigma: Tensor) -> Tensor:
        rows = [[sigma[y * search.grid // side, x * search.grid // side] for x in range(side)] for y in range(side)]
        return torch.stack([torch.stack(row) for row in rows])

    def read(x: Tensor) -> Tensor:
        value = feature(x[None])[0]
        return value.clamp(min=0) if search.relu else value

    def answers(sigma: Tensor, noise: Tensor) -> list[Tensor]:
        return [read(image + spread(sigma) * eps / scale) for eps in noise]

    noise = iter(draws)
    clean, start = read(image), torch.full((search.grid, search.grid), search.start, dtype=image.dtype)
    first = answers(start, next(noise))
    centre = clean if search.form == "reference" else torch.stack(first).mean(0)
    unit = torch.stack([(value - centre).square().mean() for value in first]).mean()
    sigma, lam, sigmas, levels = start, search.lam or 7.0, [], []
    for t in range(search.iterations):
        if t == search.check and search.form == "reference":
            if max(levels) > search.target:
                break
            lam *= search.push
        leaf = sigma.clone().requires_grad_()
        change = torch.stack([(value - clean).square().mean() for value in answers(leaf, next(noise))]).mean()
        level = (leaf.log() + 0.5 * math.log(2 * math.pi) + 0.5).mean()
        cells = search.grid**2
        (gradient,) = torch.autograd.grad(
            change / unit - (lam if search.form == "reference" else lam * cells) * level, leaf
        )
        sigmas.append(sigma)
        levels.append(level.item())
        sigma = (sigma - search.rate * gradient).clamp(search.low, search.high)
    gaps = [abs(level - search.target) for level in levels]
    chosen = gaps.index(min(gaps)) if search.form == "reference" else len(levels) - 1
    return unit, chosen, sigmas, levels


@pytest.mark.parametrize(
    "search",
    [
        QUICK,
        Search(grid=3, iterations=9, check=6, draws=6, lr=3e-4, target=-3.1),  # some are done at the check
        Search(grid=3, iterations=8, check=3, draws=4, lr=1e-3, target=1.0, high=0.012),  # all are pushed, and clamped
        Search(grid=4, iterations=5, draws=4, relu=False, antithetic=True),  # uneven cells
        Search(grid=3, iterations=5, draws=4, form="paper", lam=0.5),
    ],
)
def test_every_image_is_searched_as_a_plain_loop_would(network, images, search):
    kept: dict[int, list[Tensor]] = {k: [] for k in range(len(images))}
    generator = torch.Generator().manual_seed(5)

    def noise(rows):
        drawn = torch.randn(len(rows), search.draws, *images.shape[1:], generator=generator, dtype=images.dtype)
        for row, part in zip(rows, drawn, strict=True):
            kept[row].append(part)
        return drawn

    found = information_discarding(network, images, search, noise=noise, scale=2.0, batch=4 * search.draws)
    ended = set()
    for k, image in enumerate(images):
        unit, chosen, sigmas, levels = plain(network, image, search, kept[k], scale=2.0)
        ended.add(len(levels))
        assert_close(found.unit[k], unit)
        assert found.chosen[k] == chosen
        assert_close(found.sigma[k], sigmas[chosen])
        assert_close(found.history.sigma[: len(sigmas), k], torch.stack(sigmas))
        assert_close(found.history.entropy[: len(levels), k], torch.tensor(levels, dtype=torch.float64))
        assert found.history.entropy[len(levels) :, k].isnan().all()
        assert_close(found.entropy[k], entropy(sigmas[chosen]))
    assert found.answered.all()


def test_some_end_at_the_check_and_some_are_pushed(network, images):
    levels = information_discarding(network, images, QUICK).history.entropy[5]
    middle = levels.sort().values[1].item() + 1e-9
    mixed = Search(grid=3, iterations=9, check=6, draws=6, lr=1e-5, target=middle)
    history = information_discarding(network, images, mixed).history.entropy
    assert sorted(history[6:].isnan().all(0).tolist()) == [False, False, True]


@pytest.mark.parametrize("batch", [6, 13, 4, 1])
def test_neighbours_and_the_size_of_calls_do_not_matter(network, images, batch):
    together = information_discarding(network, images, QUICK, seed=3)
    for k in range(3):
        alone = information_discarding(network, images[k : k + 1], QUICK, seed=3, keys=[k], batch=batch)
        assert_close(alone.sigma[0], together.sigma[k])
    again = information_discarding(network, images, QUICK, seed=3, batch=batch)
    assert_close(again.sigma, together.sigma)


def test_seeds_and_keys_decide_and_nothing_else(network, images):
    torch.manual_seed(1)
    first = information_discarding(network, images, QUICK, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = information_discarding(network, images, QUICK, seed=3)
    assert torch.equal(first.sigma, again.sigma) and torch.equal(first.history.change[:6], again.history.change[:6])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert not torch.equal(first.sigma, information_discarding(network, images, QUICK, seed=4).sigma)
    assert not torch.equal(first.sigma, information_discarding(network, images, QUICK, seed=3, keys=[7, 8, 9]).sigma)


def test_antithetic_noise_comes_in_pairs(network, images):
    seen = []

    def feature(batch: Tensor) -> Tensor:
        seen.append(batch)
        return network(batch)

    search = Search(grid=3, iterations=1, draws=8, antithetic=True)
    information_discarding(feature, images[:1], search)
    noise = seen[1] - images[:1]
    assert_close(noise[:4], -noise[4:])
    assert noise[:4].std() > 0


def test_noise_is_held_back_where_the_feature_looks(images):
    """A feature that reads the left half alone: nothing bounds the noise of the right half but its own rate."""
    found = information_discarding(lambda x: x[:, :, :, :3], images, Search(grid=3, iterations=60, draws=32))
    left, right = found.entropy[:, :, 0], found.entropy[:, :, 2]
    assert (left.mean(1) < right.mean(1) - 0.3).all()
    assert torch.allclose(right[:, 0], right[:, 1])


def test_uint8_images_and_a_scale_are_normalised_pixels(network):
    pixels = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    scale = torch.tensor([0.01, 0.02, 0.03]).view(1, 3, 1, 1)
    plain_network = network.float()
    try:
        by_pixels = information_discarding(lambda x: plain_network(x * scale), pixels, QUICK, scale=scale)
        normalised = information_discarding(plain_network, pixels * scale, QUICK)
    finally:
        network.double()
    assert_close(by_pixels.sigma, normalised.sigma, 1e-4)


def test_an_image_without_an_answer_is_told_apart(network, images):
    def feature(x: Tensor) -> Tensor:
        awake = (x.mean((1, 2, 3)) != 0) & (x[:, 0, 0, 0] < 5)
        return torch.where(awake[:, None], network(x), 0.0)

    mixed = images.clone()
    mixed[1] = 100.0
    found = information_discarding(feature, mixed, QUICK)
    assert found.answered.tolist() == [True, False, True] and found.unit[1] == 0 and found.chosen[1] == -1
    assert found.sigma[1].isnan().all() and found.entropy[1].isnan().all()
    assert_close(found.sigma[2], information_discarding(network, images, QUICK).sigma[2])


def test_the_clean_feature_keeps_no_graph(network, images):
    kept = []

    def feature(batch: Tensor) -> Tensor:
        kept.append(network(batch))
        return kept[-1]

    information_discarding(feature, images, Search(grid=3, iterations=1, draws=4))
    assert [value.requires_grad for value in kept] == [False, False, True], "clean, unit, the one iteration"


def test_half_images_are_raised(network, images):
    half = images.half()
    found = information_discarding(lambda x: network(x.double()), half, QUICK)
    assert found.sigma.dtype == torch.float32 and found.answered.all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"grid": 0}, "grid is 0; give 1 or more"),
        ({"draws": 0}, "draws is 0; give 1 or more"),
        ({"start": 2.0}, "0 < low <= start <= high"),
        ({"low": 0.0}, "0 < low <= start <= high"),
        ({"lam": -1.0}, "lam is -1.0; give a positive number"),
        ({"lr": 0.0}, "lr is 0.0; give a positive number"),
        ({"target": math.inf}, "target is inf; give a finite number"),
        ({"check": 0}, "check is 0; give 1 or more"),
        ({"draws": 5, "antithetic": True}, "give an even number"),
        ({"form": "code"}, "reference"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Search(**options)


def test_bad_images_are_refused(network, images):
    with pytest.raises(UserError, match="give a smaller grid"):
        information_discarding(network, images, Search(grid=10))
    with pytest.raises(UserError, match=r"give \(N, C, H, W\)"):
        information_discarding(network, images[0], QUICK)
    for wrong in ({"keys": [1]}, {"seed": -1}, {"keys": [0, 1, -2]}):
        with pytest.raises(UserError, match="a seed and one key per image"):
            information_discarding(network, images, QUICK, **wrong)
    with pytest.raises(UserError, match="batch is 0"):
        information_discarding(network, images, QUICK, batch=0)


def test_the_rate_belongs_to_the_grid():
    assert Search().rate == 1e-4 and Search(grid=8).rate == pytest.approx(2.5e-5) and Search(lr=0.1).rate == 0.1
    assert (
        Search().weight == 7.0 and Search(form="paper").weight == 7.0 and Search(form="paper", lam=0.1).weight == 25.6
    )
