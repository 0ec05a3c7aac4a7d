"""--precision auto, --compile, and the optimisers behind them."""

from types import SimpleNamespace

import pytest
import torch
from killing import Killed, history, kill_at, same
from small_steps import CPU, assert_equal, batch, gradients, task
from tiny import TINY

from metric_kd import devices
from metric_kd.cli.distill import main as distill
from metric_kd.cli.main import main as metric_kd
from metric_kd.cli.train import main as train
from metric_kd.devices import has_bf16, resolve_precision
from metric_kd.engine import compiling
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.compiling import Compiled, compiled
from metric_kd.engine.optimisation import Settings, make_optimizer
from metric_kd.errors import UserError

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "features, expected",
    [
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": True, "avx2": True}, True),
        ({"bf16": True, "architecture": "aarch64"}, True),
        ({"avx512_bf16": False, "amx_tile": True, "avx512_f": True}, False),
        ({"l2_cache_size": 1}, False),
    ],
)
def test_a_cpu_has_what_pytorch_finds(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert has_bf16(CPU) is expected
    assert resolve_precision("auto", CPU) == ("bf16" if expected else "fp32")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_bf16(CPU), "nothing makes use of it"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("processor : 0\nflags\t\t: fpu avx512_bf16 amx_tile\n\nflags\t\t: fpu\n", True),
        ("Features\t: fp asimd bf16 sve\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16x\n", False),
        ("", False),
        (None, False),
    ],
)
def test_or_what_linux_says_where_pytorch_is_too_old(monkeypatch, tmp_path, text, expected):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert has_bf16(CPU) is expected


@pytest.mark.parametrize(
    "capability, emulates, expected",
    [((9, 0), True, True), ((8, 0), True, True), ((7, 5), True, False), ((8, 0), False, False)],
)
def test_cuda_has_it_from_ampere_on_whatever_is_emulated(monkeypatch, capability, emulates, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: emulates)
    assert has_bf16(CUDA) is expected and not has_bf16(torch.device("meta"))


def test_a_precision_that_was_named_stays(monkeypatch):
    monkeypatch.setattr(devices, "has_bf16", lambda device: True)
    assert [resolve_precision(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


def flags(data, run, *more):
    return [*TINY, "--data", str(data), "--save_dir", str(run), "--loss", "l2_triplet:1,sample=distance", *more]


def hardware(monkeypatch, there):
    for module in ("metric_kd.devices", "metric_kd.cli.session"):
        monkeypatch.setattr(f"{module}.has_bf16", lambda device: there)


def test_auto_is_resolved_before_the_run_is_named_recorded_and_resumed(image_folder, tmp_path, monkeypatch):
    hardware(monkeypatch, True)
    train(flags(image_folder, tmp_path / "auto", "--precision", "auto"))
    train(flags(image_folder, tmp_path / "bf16", "--precision", "bf16"))
    assert same(tmp_path / "auto", tmp_path / "bf16")
    assert "precision: bf16\n" in (tmp_path / "auto" / "config.yaml").read_text()
    train(flags(image_folder, tmp_path / "auto", "--precision", "bf16"))  # the same run, which is finished
    hardware(monkeypatch, False)
    with pytest.raises(UserError, match="a run with precision 'bf16', this one has 'fp32'"):
        train(flags(image_folder, tmp_path / "auto", "--precision", "auto"))
    train(flags(image_folder, tmp_path / "fp32", "--precision", "auto"))
    assert not same(tmp_path / "fp32", tmp_path / "bf16")
    assert read_checkpoint(tmp_path / "fp32" / "last.pth")["config"]["precision"] == "fp32"


def test_the_better_precision_is_pointed_out_to_who_named_none(image_folder, tmp_path, monkeypatch, capsys):
    note = "--precision auto trains most networks faster"

    def said(*more):
        train(flags(image_folder, tmp_path / "run", "--epochs", "1", "--resume", "never", *more))
        return capsys.readouterr().out

    hardware(monkeypatch, True)
    assert note in said()
    assert note not in said("--precision", "fp32") + said("--precision", "auto")
    train(["--mode", "eval", "--load", str(tmp_path / "run"), "--dataset", "folder", "--data", str(image_folder)])
    assert note not in capsys.readouterr().out
    hardware(monkeypatch, False)
    assert note not in said()


def test_images_reach_the_networks_channel_by_channel(image_folder, tmp_path, monkeypatch):
    """Pixels lie beside each other (channels_last), from the batch to the first convolution."""
    from metric_kd.models.cifar import CifarResNet

    seen = []
    forward = CifarResNet.forward

    def noting(self, images, want=("pooled",)):
        seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return forward(self, images, want)

    monkeypatch.setattr(CifarResNet, "forward", noting)
    train(flags(image_folder, tmp_path / "run", "--epochs", "1"))
    assert len(seen) > 4 and all(seen)
    state = read_checkpoint(tmp_path / "run")["model"]
    assert all(tensor.is_contiguous() for tensor in state.values()), "files are laid out as they always were"


# Optimisers.


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimisers_are_fused(name):
    optimizer = make_optimizer(Settings(1, 1, 0.1, optimizer=name), [torch.nn.Parameter(torch.ones(3))])
    assert all(group["fused"] for group in optimizer.param_groups)


def sgd(parameters):
    return make_optimizer(Settings(1, 1, 0.1, optimizer="sgd", weight_decay=0.01), parameters)


def test_momentum_starts_from_zero_where_a_scaler_skips_the_first_step():
    """PyTorch's own fused SGD goes on with whatever was in memory."""
    filled = [torch.full((1000,), 1e13) for _ in range(20)]
    del filled
    parameter, plain = torch.nn.Parameter(torch.ones(1000)), torch.nn.Parameter(torch.ones(1000))
    optimizer = sgd([parameter])
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    scaler.scale((100 * parameter.square()).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(parameter, torch.ones(1000)), "the gradient was not finite"
    slow = torch.optim.SGD([plain], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for _ in range(3):
        for p, o in ((parameter, optimizer), (plain, slow)):
            o.zero_grad()
            p.square().sum().backward()
            o.step()
    assert torch.allclose(parameter, plain, rtol=1e-6)


def test_momentum_of_a_parameter_whose_gradient_comes_late():
    """As that of a part whose loss sets in later; PyTorch's own fused SGD fails there."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(4)) for _ in range(2)] for _ in range(2))
    optimizers = [sgd(ours), torch.optim.SGD(theirs, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)]
    for step in range(3):
        for (early, late), optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (early.square().sum() + (late.square().sum() if step else 0)).backward()
            optimizer.step()
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], ours[1])


# --compile.


@pytest.fixture
def backend(monkeypatch):
    """Everything but the compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    yield
    torch._dynamo.reset()


def with_compiled(built):
    built.compiled = compiled([built.student, built.teacher], CPU)
    return built


@pytest.mark.parametrize("chunk", [0, 6])
def test_compiled_networks_give_the_same_gradients_and_leave_no_trace(backend, chunk):
    """Two steps, so that what was compiled is used again; with --relation_batch in chunks of which the last is short."""
    specs, options = ["rkd:1", "fitnet:1"], ":width=4,norm=batch"
    ours, plain = with_compiled(task(*specs, options=options)), task(*specs, options=options)
    names, kept = list(ours.state_dict()), ours.student.forward
    found = gradients(ours, batch(1), steps=2, chunk=chunk)
    assert_equal(found, gradients(plain, batch(1), steps=2, chunk=chunk), 1e-9)
    assert list(ours.state_dict()) == names and ours.student.forward == kept
    assert ours.student._compiled_call_impl is None, "evaluation and export take the network as it is"


def test_compiled_dropout_is_replayed_with_the_same_masks(backend):
    options = ":width=4,dropout=0.5"
    built = with_compiled(task("rkd:1", options=options))
    found = []
    for _ in range(2):
        built.zero_grad(set_to_none=True)
        found.append(gradients(built, batch(1), chunk=4))
    assert_equal(found[0], found[1], 1e-12)
    # One chunk is a plain step, replayed: other masks would give other gradients.
    whole, plain = (gradients(with_compiled(task("rkd:1", options=options)), batch(1), chunk=c) for c in (16, 0))
    assert_equal(whole, plain, 1e-9)


def test_features_read_by_hooks_are_those_of_the_batch_at_hand(backend):
    """torchvision's maps and layers by name come from hooks, of which compiled code might remember the first."""
    pytest.importorskip("torchvision")
    from metric_kd.models.network import NetworkSpec, build_network

    torch.manual_seed(0)
    network = build_network(NetworkSpec("resnet18", 8, input_size=32)).eval()
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        del getattr(network.base, stage)[1:]  # a block of each is compiled in half the time
    run = Compiled(network)
    for step in range(3):
        images = batch(step, 2).images
        for want in (("embedding", "maps"), ("embedding", "layer:base.layer2")):
            ours, theirs = run(images, want=want), network(images, want=want)
            close = torch.testing.assert_close  # no bits: compiled code may round otherwise
            close(ours.embedding, theirs.embedding, rtol=1e-4, atol=1e-5)
            if "maps" in want:
                assert len(ours.maps) == len(theirs.maps)
                close(ours.maps, theirs.maps, rtol=1e-4, atol=1e-4)
            else:
                close(ours.taps["base.layer2"], theirs.taps["base.layer2"], rtol=1e-4, atol=1e-4)


class EagerByAnotherName:
    def __call__(self, graph, inputs):
        return graph.forward

    def __repr__(self):
        return "another"


def test_a_compiled_run_is_recorded_killed_and_resumed(
    image_folder, teacher_run, tmp_path, monkeypatch, backend, capsys
):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    common = ["--teacher_load", str(teacher_run), "--save_minutes", "0", "--compile"]
    distill(flags(image_folder, tmp_path / "whole", *common, "--loss", "rkd:1"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(6, patch)
        distill(flags(image_folder, tmp_path / "cut", *common, "--loss", "rkd:1"))
    torch._dynamo.reset()
    capsys.readouterr()
    monkeypatch.setattr(compiling, "BACKEND", EagerByAnotherName())
    distill(flags(image_folder, tmp_path / "cut", *common, "--loss", "rkd:1"))
    assert "was written with compiled by eager, this is another;" in capsys.readouterr().out
    assert same(tmp_path / "whole", tmp_path / "cut") and history(tmp_path / "whole") == history(tmp_path / "cut")
    assert not any("_orig_mod" in key for key in read_checkpoint(tmp_path / "cut")["model"])
    with pytest.raises(UserError, match="a run with compile True, this one has False"):
        distill(flags(image_folder, tmp_path / "cut", *common, "--loss", "rkd:1", "--compile", "false"))
    assert (
        train(["--mode", "eval", "--load", str(tmp_path / "cut"), "--dataset", "folder", "--data", str(image_folder)])
        == 0
    )


def test_peers_and_coders_are_compiled_too(image_folder, teacher_run, tmp_path, monkeypatch, backend):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    calls = []
    call = Compiled.__call__
    monkeypatch.setattr(Compiled, "__call__", lambda self, *a, **k: calls.append(self) or call(self, *a, **k))
    common = ["--epochs", "1", "--compile", "--data", str(image_folder)]
    distill([*TINY, *common, "--mutual", "resnet8:stem_stride=2", "--save_dir", str(tmp_path / "m"), "--loss", "rkd:1"])
    assert len(calls) == 2 * 4 and len(set(calls)) == 2
    calls.clear()
    coders = ["--dataset", "folder", "--teacher_load", str(teacher_run), "--batch", "16", "--device", "cpu"]
    assert metric_kd(["granularity", *coders, *common, "--save_dir", str(tmp_path / "c")]) == 0
    assert len(calls) == 2 and len(set(calls)) == 1, "32 images"


def test_what_cannot_be_compiled_is_refused_in_a_sentence(image_folder, teacher_run, tmp_path, monkeypatch, backend):
    teacher = ["--teacher_load", str(teacher_run), "--loss", "sobolev:1"]
    with pytest.raises(UserError, match="'sobolev' takes gradients of gradients, .*; leave it or --compile out."):
        distill(flags(image_folder, tmp_path / "run", "--compile", *teacher))

    def missing(graph, inputs):
        raise RuntimeError("No working C++ compiler found in (None, 'g++')\nmore")

    monkeypatch.setattr(compiling, "BACKEND", missing)
    with pytest.raises(UserError, match=r"found no compiler that works \(.*No working C\+\+ compiler found"):
        train(flags(image_folder, tmp_path / "run", "--compile"))
    assert not (tmp_path / "run").exists()
    broken = SimpleNamespace(forward=lambda images, want: images * 2)
    with pytest.raises(UserError, match=r"the network cannot be compiled \(.*\); leave --compile out."):
        Compiled(broken)(torch.ones(2))


@pytest.mark.slow
def test_the_compiler_itself_gives_the_same_gradients():
    torch._dynamo.reset()
    try:
        ours = with_compiled(task("rkd:1", dtype=torch.float32))
    except UserError as error:
        pytest.skip(str(error))
    assert compiling.BACKEND == "inductor"
    plain = task("rkd:1", dtype=torch.float32)
    assert_equal(gradients(ours, batch(1)), gradients(plain, batch(1)), 1e-3)
    assert list(ours.state_dict()) == list(plain.state_dict())
