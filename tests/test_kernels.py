"""The compiled kernels of the angle loss against PyTorch's form of it, and which of them is chosen."""

import json
import subprocess
import sys
import threading
import time
import warnings
from importlib.util import find_spec

import oracles
import pytest
import torch
from largest import LargestTensor
from pinned import assert_close, case
from tiny import TINY
from torch.autograd import gradcheck

from metric_kd import kernels
from metric_kd.cli.distill import main as distill
from metric_kd.cli.parse import parse
from metric_kd.cli.validate import validate
from metric_kd.distances import Pairwise
from metric_kd.distill.relational.rkd_angle import angle_gap, angle_gap_in_tiles
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.reproducibility import environment
from metric_kd.errors import UserError
from metric_kd.functional import rkd_angle

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
KERNELS = ["torch", pytest.param("numba", marks=needs_numba)]
SIZES = [1, 2, 3, 4, 7, 17, 64, 100]


def rows(n, d, dtype=torch.float64, seed=0):
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def squared(n, dtype=torch.float64):
    return tuple(Pairwise(rows(n, 12, seed=seed)).squared.to(dtype) for seed in (0, 1))


def run(student, teacher):
    x = student.clone().requires_grad_()
    value = rkd_angle(x, teacher)
    value.backward()
    return value.detach(), x.grad


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


@pytest.fixture
def numba_kernel(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setenv(kernels.VARIABLE, "numba")
    from metric_kd.kernels import angle_numba

    return angle_numba


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_numba_equals_torch(numba_kernel, n, dtype, tolerance):
    expected, expected_gradient = angle_gap_in_tiles(*squared(n))
    loss, gradient = numba_kernel.angle_gap(*squared(n, dtype))
    assert loss.dtype == gradient.dtype == dtype and loss.shape == () and gradient.shape == (n, n)
    assert torch.equal(gradient, gradient.T) and (gradient.diagonal() == 0).all()
    if n < 3:
        assert loss < 1e-13 and gradient.abs().max() < 1e-6  # rounding of A = 1 with itself
        return
    assert_close(loss.double(), expected, tolerance)
    assert_close(gradient.double(), expected_gradient, tolerance)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_numba_equals_torch_with_duplicates(numba_kernel, which, dtype, tolerance):
    student, teacher = rows(37, 5), rows(37, 7, seed=1)
    for name, x in (("student", student), ("teacher", teacher)):
        if which in (name, "both"):
            x[3], x[30], x[31] = x[8], x[0], x[0]
    u, v = Pairwise(student).squared, Pairwise(teacher).squared
    expected, expected_gradient = angle_gap_in_tiles(u, v)
    loss, gradient = numba_kernel.angle_gap(u.to(dtype), v.to(dtype))
    assert_close(loss.double(), expected, tolerance)
    assert_close(gradient.double(), expected_gradient, tolerance)


def test_linear_part_of_the_huber_function(kernel):
    # on a line, all cosines are 1 or -1: gaps of 2 wherever the order of three differs
    student, teacher = torch.arange(20.0, dtype=torch.float64)[:, None], rows(20, 1, seed=3)
    value = rkd_angle(student, teacher)
    assert value > 0.3
    assert_close(value, oracles.rkd_angle_plain(student, teacher))
    student, teacher = rows(20, 2), -rows(20, 2, seed=5)
    x = student.clone().requires_grad_()
    oracles.rkd_angle_plain(x, teacher).backward()
    assert_close(run(student, teacher)[1], x.grad)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_than_three_rows(kernel, n, dtype):
    value, gradient = run(rows(n, 4, dtype), rows(n, 6, dtype, seed=1))
    assert value == 0 and gradient.shape == (n, 4) and (gradient == 0).all()


@pytest.mark.parametrize("n", [3, 6, 18])
def test_gradcheck(kernel, n):
    teacher = rows(n, 5, seed=1)
    assert gradcheck(lambda s: rkd_angle(s, teacher), rows(n, 2).requires_grad_())


@pytest.mark.parametrize("name", ["rkd_angle", "zoo_rkd_angle"])
def test_golden(kernel, name):
    pinned = case(name)
    value, gradient = run(*pinned.inputs.values())
    assert_close(value, pinned.outputs["loss"])
    assert_close(gradient, next(v for k, v in pinned.outputs.items() if k.startswith("grad_")))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("row", [0, 20])
def test_what_is_not_finite_is_not_hidden(kernel, bad, dtype, whose, row):
    u, v = (x.clone() for x in squared(21, dtype))
    (u, v)[whose][row, 1:5] = (u, v)[whose][1:5, row] = bad
    loss, gradient = angle_gap(u, v)
    assert loss.isnan() and gradient.isnan().any()
    both = rows(21, 3, dtype), rows(21, 3, dtype, seed=1)
    both[whose][row, 0] = bad
    assert rkd_angle(*both).isnan()


def test_tensors_that_are_not_contiguous(kernel):
    student, teacher = rows(19, 8), rows(19, 6, seed=1)
    expected = run(student, teacher)
    apart = torch.stack([student, -student], 2)[..., 0], torch.stack([teacher, -teacher], 2)[..., 0]
    assert not any(x.is_contiguous() for x in apart)
    for ours, same in zip(run(*apart), expected, strict=True):
        assert_close(ours, same, 1e-12)
    for n in (16, 19):  # whole and padded rows
        u, v = squared(n)
        ours, same = angle_gap(u.T, torch.stack([v, -v], 2)[..., 0]), angle_gap(u, v)
        for mine, theirs in zip(ours, same, strict=True):
            # No bits: where `rows @ rows.T` is not bit-symmetric, as without AVX-512, u.T holds other numbers than u.
            assert_close(mine, theirs, 1e-12)


@pytest.mark.parametrize("n", [40, 150, 200])
def test_results_depend_on_neither_threads_nor_calls(numba_kernel, n):
    u, v = squared(n, torch.float32)
    kept = u.clone(), v.clone()
    first = numba_kernel.angle_gap(u, v)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again = numba_kernel.angle_gap(u, v)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
    assert torch.equal(u, kept[0]) and torch.equal(v, kept[1])
    assert_close(first[1].double(), angle_gap_in_tiles(u.double(), v.double())[1], 1e-5)


def test_no_more_threads_than_torch_has(numba_kernel, monkeypatch):
    numba_kernel.angle_gap(*squared(300, torch.float32))
    running, most, call = set(), [], numba_kernel._call

    def counted(*arguments):
        running.add(threading.get_ident())
        most.append(len(running))
        time.sleep(0.02)
        call(*arguments)
        running.discard(threading.get_ident())

    monkeypatch.setattr(numba_kernel, "_call", counted)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        most.clear()
        numba_kernel.angle_gap(*squared(300, torch.float32))
        assert len(most) == 4 and max(most) == threads


def test_no_large_tensor(kernel):
    u, v = squared(160, torch.float32)
    with LargestTensor() as made:
        angle_gap(u, v)
    assert made.elements <= 2**17 < 160**3  # torch's tiles; 160 x 160 a thread


@needs_numba
def test_kernel_is_chosen_and_recorded(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert kernels.chosen(CPU) == kernels.chosen(CPU, torch.float64) == "numba"
    assert kernels.chosen(CPU, torch.float16) == kernels.chosen(torch.device("meta")) == "torch"
    assert environment(CPU)["kernels"].startswith("numba 0.")
    for wish in ("off", "torch", " OFF "):
        monkeypatch.setenv(kernels.VARIABLE, wish)
        assert kernels.chosen(CPU) == kernels.chosen(CUDA) == environment(CPU)["kernels"] == "torch"
        assert kernels.angle_gap(*squared(4)) is None
    for wish in ("", "auto", "numba"):
        monkeypatch.setenv(kernels.VARIABLE, wish)
        assert kernels.chosen(CPU) == "numba" and kernels.angle_gap(*squared(4)) is not None


@pytest.mark.parametrize("present", [True, False])
def test_triton_is_chosen_for_float32_on_cuda_only(monkeypatch, present):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_installed", lambda name: present)
    assert kernels.chosen(CUDA) == ("triton" if present else "torch")
    assert kernels.chosen(CUDA, torch.float64) == "torch"
    assert kernels.chosen(CPU) == ("numba" if present else "torch")


def test_wishes_that_cannot_be_met(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for wish, device, sentence in (
        ("nubma", CPU, "unknown METRIC_KD_KERNELS 'nubma'; did you mean 'numba'?"),
        ("numba", CUDA, "serves the CPU and this is cuda"),
        ("triton", CPU, "serves CUDA and this is cpu"),
    ):
        monkeypatch.setenv(kernels.VARIABLE, wish)
        monkeypatch.setattr(kernels, "_installed", lambda name: True)
        with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
            kernels.chosen(device)
        if device == CPU:
            with pytest.raises(UserError):
                rkd_angle(rows(4, 2), rows(4, 2))
            with pytest.raises(UserError):
                environment(CPU)
    monkeypatch.setattr(kernels, "_installed", lambda name: False)
    for wish in ("numba", "triton"):
        monkeypatch.setenv(kernels.VARIABLE, wish)
        with pytest.raises(UserError, match=f"{wish} is not installed; .*install"):
            kernels.chosen(CPU if wish == "numba" else CUDA)


@pytest.fixture
def broken_kernel(monkeypatch):
    def kernel(u, v):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(kernels, "_installed", lambda name: True)
    monkeypatch.setattr(kernels, "_failed", set())
    monkeypatch.setattr(kernels, "_angle_kernel", lambda name: kernel)


def test_torch_takes_over_from_a_kernel_that_fails(monkeypatch, broken_kernel):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    student, teacher = rows(6, 3), rows(6, 3, seed=1)
    with pytest.warns(UserWarning, match=r"numba kernel of the angle loss failed \(no compiler\); PyTorch"):
        value = rkd_angle(student, teacher)
    assert_close(value, oracles.rkd_angle(student, teacher))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(rkd_angle(student, teacher), value)
    assert environment(CPU)["kernels"] == "torch"


def test_a_run_records_what_computed_it(monkeypatch, broken_kernel, image_folder, teacher_run, tmp_path):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    flags = [*TINY, "--data", str(image_folder), "--teacher_load", str(teacher_run), "--loss", "rkd_angle:1"]
    with pytest.warns(UserWarning, match="PyTorch computes it from here on"):
        distill([*flags, "--save_dir", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "card.json").read_text())["environment"]["kernels"] == "torch"
    assert read_checkpoint(tmp_path / "run" / "last.pth")["environment"]["kernels"] == "torch"


def test_a_wish_that_cannot_be_met_is_refused_before_any_work(monkeypatch, tmp_path):
    for wish, sentence in (
        ("nubma", "unknown METRIC_KD_KERNELS 'nubma'"),
        ("triton", "METRIC_KD_KERNELS=triton was asked"),
    ):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setenv(kernels.VARIABLE, wish)
        config = parse("train", [*TINY, "--data", str(tmp_path / "none")]).config
        assert any(text.startswith(sentence) for text in validate(config))


def test_a_kernel_that_was_insisted_on_fails_aloud(monkeypatch, broken_kernel):
    monkeypatch.setenv(kernels.VARIABLE, "numba")
    with pytest.raises(UserError, match=r"asked for, but its kernel failed \(no compiler\); unset it"):
        rkd_angle(rows(6, 3), rows(6, 3, seed=1))


def test_memory_that_runs_out_is_no_reason_for_another_kernel(monkeypatch, broken_kernel):
    def kernel(u, v):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "_angle_kernel", lambda name: kernel)
    with pytest.raises(torch.OutOfMemoryError):
        rkd_angle(rows(6, 3), rows(6, 3, seed=1))


@pytest.mark.parametrize("at_call, n", [(False, 5), (True, 5), (True, 200)])
def test_cache_on_disk_that_cannot_be_used(numba_kernel, monkeypatch, at_call, n):
    u, v = squared(n)  # 200: three groups of anchors, each in a thread of its own
    torch.set_num_threads(3)
    expected = numba_kernel.angle_gap(u, v)
    compiled, asked = numba_kernel._compiled[0], []

    def fails(*arguments):
        time.sleep(0.05)  # the others come in the meantime
        raise OSError("no space left on device")

    def compile_(cache):
        asked.append(cache)
        if cache and not at_call:
            raise RuntimeError("no locator available")
        return fails if cache else compiled

    monkeypatch.setattr(numba_kernel, "_compiled", [])
    monkeypatch.setattr(numba_kernel, "_compile", compile_)
    with pytest.warns(UserWarning, match="could not keep its kernel on disk"):
        again = numba_kernel.angle_gap(u, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numba_kernel.angle_gap(u, v)
    assert torch.equal(again[1], expected[1]) and asked == [True, False]


INTERPRETED = """
import torch
from torch.autograd import gradcheck
from metric_kd import kernels
from metric_kd.distances import Pairwise
from metric_kd.distill.relational.rkd_angle import angle_gap_in_tiles, rkd_angle
from metric_kd.kernels import angle_triton
from pinned import assert_close, case

torch.set_num_threads(1)
def rows(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

def compare(student, teacher, dtype, tolerance):
    u, v = Pairwise(student).squared, Pairwise(teacher).squared
    expected, loss = angle_gap_in_tiles(u, v), angle_triton.angle_gap(u.to(dtype), v.to(dtype))
    assert loss[0].dtype == loss[1].dtype == dtype
    for ours, theirs in zip(loss, expected):
        assert_close(ours.double(), theirs, tolerance)

compare(rows(3, 4), rows(3, 5, 1), torch.float64, 1e-12)
angle_triton.ANCHORS, angle_triton.ROWS, angle_triton.COLUMNS, angle_triton.TILE = 4, 4, 4, 4
student, teacher = rows(10, 4), rows(10, 5, 1)  # three tiles an edge, the last half empty, in two splits
compare(student, teacher, torch.float32, 1e-5)
student[3] = student[8]; teacher[4] = teacher[0]; student[9] = student[2]; teacher[9] = teacher[2]  # one side, both
compare(student, teacher, torch.float64, 1e-12)
u, v = Pairwise(student[:5]).squared, Pairwise(teacher[:5]).squared
first, second = angle_triton.angle_gap(u.T, v), angle_triton.angle_gap(u, v)
assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
u[1, 4] = u[4, 1] = float("nan")
loss, gradient = angle_triton.angle_gap(u, v)
assert loss.isnan() and gradient.isnan().any()

assert kernels.chosen(torch.device("cpu")) == "triton"  # insisted on; what follows goes through the front door
assert gradcheck(lambda s: rkd_angle(s, rows(3, 3, 1)), rows(3, 2).requires_grad_())
pinned = case("rkd_angle")
x = next(iter(pinned.inputs.values())).clone().requires_grad_()
value = rkd_angle(x, pinned.inputs["teacher"])
value.backward()
assert_close(value, pinned.outputs["loss"])
assert_close(x.grad, pinned.outputs["grad_student"])
print("done")
"""


@needs_triton
def test_triton_as_interpreted_on_the_cpu(monkeypatch, request):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    monkeypatch.setenv("PYTHONPATH", f"{request.path.parent}:{request.path.parent.parent}")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", INTERPRETED], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
