"""Networks for images of 32 px: published parameter counts and shapes, and that each can be used everywhere."""

import copy
import io

import pytest
import torch
from small_networks import built, close, on_meta, pictures
from torch import nn
from torch.nn import functional as F

import metric_kd.distill  # noqa: F401 (registers the methods)
from metric_kd.cli.listing import main as list_main
from metric_kd.engine.tasks import Solo
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective, parse_loss, require_provided
from metric_kd.models import NetworkSpec, build_network, check_base, load_weights
from metric_kd.types import Batch

PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8_x4": 1_233_540,
    "resnet32_x4": 7_433_860,
    "resnet14_x0.5": 47_340,
    "resnet20_x0.5": 71_756,
    "resnet20_x0.375": 41_194,
    "resnet50_cifar": 23_705_252,
    "wrn_16_1": 180_916,
    "wrn_40_1": 569_780,
    "wrn_16_2": 703_284,
    "wrn_40_2": 2_255_156,
    "vgg8_cifar": 3_965_028,
    "vgg11_cifar": 9_277_284,
    "vgg13_cifar": 9_462_180,
    "vgg16_cifar": 14_774_436,
    "vgg19_cifar": 20_086_692,
    "mobilenet_v2_cifar": 812_836,
    "shufflenet_v1_cifar": 949_258,
    "shufflenet_v2_cifar": 1_355_528,
}
"""With 100 classes, as measured on the reference of multi-granularity distillation."""

VGG = ((64, 128, 256, 512, 512), (32, 16, 8, 4, 4), (64, 32, 16, 8, 4), 512)
SHAPES = {
    # channels of stem and stages, their px at 32, at 64, pooled features
    **{f"vgg{depth}_cifar": VGG for depth in (8, 11, 13, 16, 19)},
    "mobilenet_v2_cifar": ((16, 12, 16, 48, 160), (16, 16, 8, 4, 2), (32, 32, 16, 8, 4), 1280),
    "resnet50_cifar": ((64, 256, 512, 1024, 2048), (32, 32, 16, 8, 4), (64, 64, 32, 16, 8), 2048),
    "shufflenet_v1_cifar": ((24, 240, 480, 960), (32, 16, 8, 4), (64, 32, 16, 8), 960),
    "shufflenet_v2_cifar": ((24, 116, 232, 464), (32, 16, 8, 4), (64, 32, 16, 8), 1024),
}
SMALLER = ("vgg8_cifar", "mobilenet_v2_cifar", "shufflenet_v1_cifar", "shufflenet_v2_cifar", "resnet50_cifar")
"""One of each kind, where all depths would only cost time."""
EVERYTHING = ("maps", "preacts", "pooled", "embedding", "logits")


@pytest.mark.parametrize("base", PARAMETERS)
def test_parameter_counts_are_the_published_ones(base):
    assert sum(p.numel() for p in on_meta(base).parameters()) == PARAMETERS[base]


def test_every_network_is_listed(capsys):
    list_main(["backbones"])
    listed = capsys.readouterr().out.split()
    assert {base for base in PARAMETERS if "_x" not in base} <= set(listed)
    assert {"vgg16", "mobilenet_v2", "shufflenet_v2_x1_0", "resnet50"} <= set(listed), "torchvision's own names"


@pytest.mark.parametrize("base", SHAPES)
def test_maps_and_preacts_have_the_documented_shapes(base):
    channels, at_32, at_64, pooled = SHAPES[base]
    network = on_meta(base)
    assert network.pooled_size == pooled and network.spec.input_size == 32
    for size, sides in ((32, at_32), (64, at_64)):
        out = network(torch.empty(2, 3, size, size, device="meta"), want=EVERYTHING)
        shapes = [(2, c, side, side) for c, side in zip(channels, sides, strict=True)]
        assert [tuple(m.shape) for m in out.maps] == [tuple(m.shape) for m in out.preacts] == shapes
        assert out.pooled.shape == (2, pooled) and out.logits.shape == (2, 100)


@pytest.mark.parametrize("base", PARAMETERS)
def test_every_network_takes_32_and_64_px(base):
    network = on_meta(base)
    for size in (32, 64):
        out = network(torch.empty(2, 3, size, size, device="meta"), want=("maps", "pooled", "logits"))
        assert out.logits.shape == (2, 100) and out.maps[0].shape[2] in (size, size // 2)


@pytest.mark.parametrize("base", SHAPES)
def test_any_image_size_works(base):
    network = on_meta(base)
    for height, width in ((8, 8), (45, 70), (96, 96)):
        out = network(torch.empty(1, 3, height, width, device="meta"), want=("maps", "pooled"))
        assert out.pooled.shape == (1, network.pooled_size)
        sides = [tuple(m.shape[2:]) for m in out.maps]
        assert sides == sorted(sides, reverse=True) and min(sides[-1]) >= 1
    assert check_base(base, 96) == 96


@pytest.mark.parametrize("base", SHAPES)
def test_forward(base):
    """Finite at 32 and 64 px, the same twice and whatever else is wanted."""
    network = built(base)
    out = network(pictures(2), want=EVERYTHING)
    assert all(t.isfinite().all() for field in (out.maps, out.preacts, out[2:5]) for t in field)
    again = network(pictures(2), want=("logits",))
    assert torch.equal(again.logits, out.logits) and again.maps is None and again.preacts is None
    assert out.logits[0].sub(out.logits[1]).abs().max() > 1e-3, "the image matters"
    assert network(pictures(1, 64)).embedding.isfinite().all()


@pytest.mark.parametrize("base", SHAPES)
def test_a_map_is_its_activated_preact(base):
    out = built(base)(pictures(2), want=("maps", "preacts"))
    if base == "mobilenet_v2_cifar":  # a linear bottleneck ends without activation
        assert torch.equal(F.relu6(out.preacts[0]), out.maps[0])
        assert all(torch.equal(m, p) for m, p in zip(out.maps[1:], out.preacts[1:], strict=True))
    else:
        assert all(torch.equal(p.relu(), m) for m, p in zip(out.maps, out.preacts, strict=True))
    assert all(p.min() < 0 < p.max() for p in out.preacts), "there is a boundary for AB and OFD to look at"


@pytest.mark.parametrize("base", ["vgg8_cifar", "resnet50_cifar", "shufflenet_v1_cifar"])
def test_pooled_is_the_mean_of_the_last_map(base):
    out = built(base)(pictures(2), want=("maps", "pooled"))
    close(out.pooled, out.maps[-1].mean((2, 3)), 1e-6)


@pytest.mark.parametrize("base", SHAPES)
def test_a_training_step_reaches_every_weight(base):
    network = copy.deepcopy(built(base)).train().requires_grad_(True)
    out = network(pictures(2), want=("embedding", "logits"))
    assert out.embedding.shape == (2, 6) and out.logits.shape == (2, 10)
    (F.cross_entropy(out.logits, torch.tensor([0, 1])) + out.embedding.sum()).backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    # A bias in front of a batch normalisation has none but for rounding.
    assert all(g.any() for name, g in gradients.items() if not name.endswith("bias"))


def tensors(out):
    return (*out.maps, *out.preacts, out.pooled, out.embedding, out.logits)


@pytest.mark.parametrize("base", SMALLER)
def test_neither_layout_nor_other_images_matter(base):
    """In float64, for in float32 an untrained deep network makes much of the last digits."""
    images = pictures(2, 24)
    network = copy.deepcopy(built(base)).double()
    plain, single = tensors(network(images, want=EVERYTHING)), tensors(network(images[1:], want=EVERYTHING))
    network.to(memory_format=torch.channels_last)
    last = tensors(network(images.contiguous(memory_format=torch.channels_last), want=EVERYTHING))
    for ours, alone, theirs in zip(last, single, plain, strict=True):
        close(ours, theirs)
        close(alone, theirs[1:])
        assert ours.ndim != 4 or ours.is_contiguous(memory_format=torch.channels_last), "no layer changes the layout"


@pytest.mark.parametrize("base", PARAMETERS)
def test_no_strided_1x1_convolution(base):
    """PyTorch's kernel for it ends the process for narrow channels_last maps; see ``cifar.Projection``."""
    convolutions = [m for m in on_meta(base).modules() if isinstance(m, nn.Conv2d)]
    assert not any(c.kernel_size == (1, 1) and c.stride != (1, 1) for c in convolutions)


@pytest.mark.parametrize("base", SMALLER)
def test_state_survives_a_file(base):
    network, file = built(base), io.BytesIO()
    torch.save({"spec": network.spec.to_dict(), "state": network.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    other = build_network(NetworkSpec.from_dict(stored["spec"])).eval()
    assert load_weights(other, stored["state"], strict=True) == []
    assert torch.equal(other(pictures(1)).embedding, network(pictures(1)).embedding)


def test_classes_and_embedding_are_free():
    for base in SHAPES:
        pooled = SHAPES[base][3]
        plain, headed = on_meta(base, num_classes=None), on_meta(base, num_classes=7, embedding_size=5)
        assert "logits" not in plain.provides and {"maps", "preacts", "logits"} <= headed.provides
        sizes = [sum(p.numel() for p in network.parameters()) for network in (plain, headed)]
        assert sizes[1] - sizes[0] == (pooled + 1) * (7 + 5)


def test_vgg_below_64_px_pools_three_times_and_refuses_what_leaves_nothing():
    for size, last in ((8, 1), (63, 7), (64, 4)):
        assert (
            on_meta("vgg8_cifar")(torch.empty(1, 3, size, size, device="meta"), want=("maps",)).maps[-1].shape[2]
            == last
        )
    with pytest.raises(UserError, match="cannot take images of 7x32 px; give at least 8x8"):
        built("vgg8_cifar")(torch.zeros(1, 3, 7, 32))


def test_mobilenet_takes_other_widths():
    full = on_meta("mobilenet_v2_cifar_x1")
    out = full(torch.empty(1, 3, 32, 32, device="meta"), want=("maps",))
    assert [m.shape[1] for m in out.maps] == [32, 24, 32, 96, 320] and full.pooled_size == 1280
    assert on_meta("mobilenet_v2_cifar:width=1.5").pooled_size == 1920
    assert [
        m.shape[1]
        for m in on_meta("mobilenet_v2_cifar_x0.3")(torch.empty(1, 3, 32, 32, device="meta"), want=("maps",)).maps
    ] == [9, 7, 9, 28, 96]
    for width in ("0", "0.06", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="choose 0.0625 or more"):
            on_meta(f"mobilenet_v2_cifar:width={width}")
    with pytest.raises(UserError, match="takes no options"):
        build_network(NetworkSpec("vgg8_cifar:width=0.5"))


def test_initialisation():
    torch.manual_seed(0)
    vgg = build_network(NetworkSpec("vgg8_cifar")).base
    convolution = vgg.block3[0]
    assert convolution.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)
    assert not convolution.bias.any() and vgg.block3[1].weight.eq(1).all()
    shuffle = build_network(NetworkSpec("shufflenet_v2_cifar")).base
    assert shuffle.head[0].weight.abs().max().item() == pytest.approx((1 / 464) ** 0.5, rel=0.01)


METHODS = ("at", "nst", "sp", "crd", "vid", "ofd")


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("base", SMALLER)
def test_distils_and_is_distilled(base, role):
    """One step with six methods at once: maps, pre-activations and pooled features of every kind of network."""
    torch.manual_seed(0)
    other = build_network(NetworkSpec("wrn_10_1", embedding_size=0, num_classes=10))
    this = copy.deepcopy(built(base)).requires_grad_(True)
    student, teacher = (this, other) if role == "student" else (other, this)
    losses = [parse_loss(name) for name in METHODS]
    objective = Objective(losses)
    require_provided("student", student.provides, objective)
    require_provided("teacher", teacher.provides, objective, teacher=True)
    task = Solo(student, teacher, objective)
    batch = Batch(pictures(4), torch.arange(4), torch.arange(4))
    task.build(batch, 10, torch.arange(24) % 10)
    total, values = task.train()(batch)
    total.backward()
    assert set(values) == set(METHODS) and all(v.isfinite() and v != 0 for v in values.values())
    parameters = dict(student.named_parameters())
    assert all(p.grad.isfinite().all() for p in parameters.values() if p.grad is not None)
    assert {n for n, p in parameters.items() if p.grad is None} <= {"classifier.weight", "classifier.bias"}
