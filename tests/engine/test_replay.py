"""--relation_batch: the gradient of a large batch from a chunk at a time, against one batch and against slow oracles."""

import os
import socket

import pytest
import template
import torch
from killing import Killed, history, kill_at, same
from small_steps import CPU, assert_equal, batch, gradients, network, part, stepping, task
from tiny import THREADS, TINY
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from metric_kd import distributed
from metric_kd.cli.distill import main as distill
from metric_kd.cli.train import main as train
from metric_kd.engine import memory, reproducibility
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.mutual import Mutual
from metric_kd.engine.optimisation import Settings
from metric_kd.engine.replay import Replay, average_gradients, chunks, joined, tensors
from metric_kd.errors import UserError
from metric_kd.losses.objective import parse_loss
from metric_kd.types import Batch, Output

CASES = {
    "relations": ["rkd_distance:1", "rkd_angle:2"],
    "ranks": ["dark_rank:1"],
    "triplets, drawn": ["l2_triplet:1,sample=distance"],
    "all triplets": ["l2_triplet:1,sample=all", "st:1"],
    "maps, trained connectors": ["fitnet:1", "at:10"],
    "a memory": ["crd:1,negatives=3"],
    "logits": ["st:1", "cross_entropy:1"],
    "a stage without the student": ["ft:10"],
    "a stage of preactivations": ["ab:1"],
    "layers by name": ["imitate:1,layer=logits"],
}


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_whole_batch(case, dtype, rtol):
    """Values, gradients of the student and of the terms' own parts, and what terms remember."""
    expected = gradients(task(*CASES[case], dtype=dtype), batch(1), steps=2)
    assert any(value.abs().max() > 0 for name, value in expected.items() if "student" in name and "weight" in name)
    for chunk in (4, 5, 16) if dtype == torch.float64 else (4,):
        assert_equal(gradients(task(*CASES[case], dtype=dtype), batch(1), steps=2, chunk=chunk), expected, rtol)


@pytest.mark.parametrize("options", ["norm=batch", "dropout=0.3", "norm=batch,dropout=0.3"])
def test_statistics_and_dropout_are_those_of_chunks(options):
    """The oracle keeps the graphs of all chunks at once. Batch normalisation moves once for each chunk, not twice."""
    specs = ["rkd_distance:1", "fitnet:1"]
    whole = batch(1)
    slow = task(*specs, options=f":width=4,{options}")
    slow.train()
    reproducibility.seed_step(3, 1, 0)
    parts = [part(whole, slice(0, 6)), part(whole, slice(6, 12)), part(whole, slice(12, 16))]
    total, _ = slow.compare(joined([slow.student_output(p) for p in parts]), slow.teacher_output(whole), whole)
    total.backward()
    ours = task(*specs, options=f":width=4,{options}")
    gradients(ours, whole, chunk=6)
    for (name, mine), other in zip(ours.named_parameters(), slow.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        assert mine.grad is None or torch.allclose(mine.grad, other.grad, rtol=1e-9, atol=1e-12), name
    for (name, mine), other in zip(ours.named_buffers(), slow.buffers(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-12), name
    counts = [b for name, b in ours.student.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts or "batch" not in options
    assert all(count == 3 for count in counts)


def test_frozen_statistics_give_the_gradient_of_the_whole_batch():
    specs, options = CASES["relations"], ":width=4,norm=batch"
    expected = gradients(task(*specs, options=options), batch(1), freeze_bn=True)
    assert_equal(gradients(task(*specs, options=options), batch(1), freeze_bn=True, chunk=4), expected, 1e-9)
    unlike = gradients(task(*specs, options=options), batch(1), chunk=4)
    with pytest.raises(AssertionError):
        assert_equal(unlike, gradients(task(*specs, options=options), batch(1)), 1e-9)


def test_an_embedding_that_is_the_pooled_feature_gets_both_gradients():
    specs = ["rkd_distance:1", "l2_triplet:1", "imitate:1,layer=pooled"]
    built = [task(*specs, size=0, teacher=":width=4") for _ in range(2)]
    output = built[0].student_output(batch(1))
    assert output.taps["pooled"] is output.embedding
    assert_equal(gradients(built[0], batch(1), chunk=4), gradients(built[1], batch(1)), 1e-9)


def test_a_scaled_loss_is_scaled_once():
    plain, scaled = task(*CASES["maps, trained connectors"]), task(*CASES["maps, trained connectors"])
    Replay(plain, 4)(batch(1), lambda loss: loss)
    Replay(scaled, 4)(batch(1), lambda loss: loss * 1024)
    pairs = [(a.grad, b.grad) for a, b in zip(scaled.parameters(), plain.parameters(), strict=True)]
    assert any(a is not None for a, _ in pairs)
    assert all(a is b or torch.allclose(a, b * 1024, rtol=1e-12) for a, b in pairs)


def test_a_scaler_that_overflows_skips_the_step_and_one_that_does_not_takes_it():
    """fp16 without half types: what is tested is the scaler of the trainer around the replay."""
    ends = []
    for chunk in (0, 4):
        built = task(*CASES["relations"], dtype=torch.float32)
        trainer = stepping(built, precision="fp16", chunk=chunk, lr=0.1)
        before = [p.detach().clone() for p in built.parameters()]
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)  # the gradient is not finite
        trainer.trial_step(batch(1))
        assert all(torch.equal(a, b) for a, b in zip(before, built.parameters(), strict=True))
        assert trainer.scaler.get_scale() < 3e38
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        trainer.trial_step(batch(2))
        ends.append([p.detach() - b for p, b in zip(built.parameters(), before, strict=True)])
    assert any(move.abs().max() > 0 for move in ends[0])
    for plain, replayed in zip(*ends, strict=True):
        assert torch.allclose(plain, replayed, rtol=1e-4, atol=1e-6)


def test_no_pass_is_larger_than_a_chunk_and_the_first_has_no_graph(monkeypatch):
    built, seen = task(*CASES["relations"]), []
    forward = type(built.student).forward

    def noting(self, images, want=("embedding",)):
        seen.append((self is built.student, len(images), torch.is_grad_enabled()))
        return forward(self, images, want)

    monkeypatch.setattr(type(built.student), "forward", noting)
    gradients(built, batch(1), chunk=6)
    assert [(count, graph) for ours, count, graph in seen if ours] == [
        (6, False), (6, False), (4, False), (6, True), (6, True), (4, True),
    ]  # fmt: skip
    assert [(count, graph) for ours, count, graph in seen if not ours] == [(6, False), (6, False), (4, False)]


def test_the_graph_of_one_chunk_is_all_that_is_held():
    """Tensors that autograd keeps at any one time, in numbers: the graph of a chunk, and what losses keep of all."""

    def most_kept(chunk):
        built, kept, most = task("rkd_distance:1"), [0], [0]

        class Box:
            def __init__(self, tensor):
                self.tensor = tensor
                kept[0] += tensor.numel()
                most[0] = max(most[0], kept[0])

            def __del__(self):
                kept[0] -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
            gradients(built, batch(1, 48), chunk=chunk)
        return most[0]

    assert most_kept(6) < most_kept(0) / 4


def test_random_numbers_go_on_behind_the_losses_wherever_chunks_end():
    after = []
    for chunk in (0, 4, 16):
        gradients(task("l2_triplet:1,sample=distance"), batch(1), chunk=chunk)
        after.append(torch.rand(3))
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])


@pytest.mark.parametrize(
    "count, size, sizes", [(8, 4, [4, 4]), (10, 4, [4, 4, 2]), (9, 4, [4, 5]), (1, 4, [1]), (3, 4, [3])]
)
def test_chunks_leave_no_image_alone(count, size, sizes):
    whole = batch(1, count)._replace(views=torch.arange(count), teacher_images=torch.arange(count))
    parts = chunks(whole, size)
    assert [len(p.labels) for p in parts] == sizes
    for field in Batch._fields:
        assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(whole, field))


def test_outputs_are_joined_field_by_field():
    def some(k):
        rows = torch.full((2, 3), float(k))
        return Output(maps=(rows, rows + 1), embedding=rows + 2, taps={"a": rows + 3}, codes=(rows + 4, rows + 5))

    whole = joined([some(0), some(9)])
    assert isinstance(whole, Output) and whole.pooled is None and whole.logits is None
    assert [t[:, 0].tolist() for t in tensors(whole)] == [[k, k, k + 9, k + 9] for k in range(6)]
    assert joined([None, None]) is None and tensors(None) == []


def test_what_cannot_be_replayed_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="'bss' runs the networks itself"):
        stepping(task("bss:1", "st:1"), chunk=4)
    with pytest.raises(UserError, match="'sobolev' takes gradients of what the networks give"):
        stepping(task("sobolev:1", "st:1"), chunk=4)
    peers = Mutual({"student": network("", 8, 0), "peer": network("", 8, 1)}, [parse_loss("dml:1")])
    with pytest.raises(UserError, match="one student"):
        stepping(peers, chunk=4)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--relation_batch", "20"], "taken --batch 12 images at a time; make it a multiple of --batch."),
        (["--relation_batch", "0"], "--relation_batch is 0; give 1 or more."),
        (["--relation_batch", "24", "--accumulate", "2"], "leave one of them out."),
        (["--relation_batch", "24", "--loss", "sobolev:1"], "leave one of the two out."),
        (["--relation_batch", "24", "--loss", "bss:1"], "leave it or --relation_batch out."),
        (["--relation_batch", "24", "--mutual", "resnet8"], "leave it out here."),
        (["--batch", "3", "--relation_batch", "3"], "--relation_batch 3 holds fewer than two classes"),
    ],
)
def test_flags_that_do_not_go_together(flags, sentence, teacher_run, tmp_path):
    """Refused before any data are looked for."""
    teacher = [] if "--mutual" in flags else ["--teacher_load", str(teacher_run), "--dist_ratio", "1"]
    with pytest.raises(UserError) as caught:
        distill([*TINY, "--data", str(tmp_path / "none"), *teacher, *flags])
    assert sentence in str(caught.value)


def flags_of(data, teacher, run):
    return [
        *TINY, "--data", str(data), "--teacher_load", str(teacher), "--save_dir", str(run), "--save_minutes", "0",
        "--relation_batch", "24", "--loss", "rkd_distance:1", "--loss", "l2_triplet:1,sample=distance", "--loss", "fitnet:0.1",
    ]  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--precision", "bf16", "--clip_norm", "1"]])
def test_killed_and_resumed_gives_the_same_weights(image_folder, teacher_run, tmp_path, monkeypatch, more):
    distill([*flags_of(image_folder, teacher_run, tmp_path / "whole"), *more])
    for step in (2, 7):
        cut = tmp_path / f"cut{step}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(step, patch)
            distill([*flags_of(image_folder, teacher_run, cut), *more])
        distill([*flags_of(image_folder, teacher_run, cut), *more])
        assert same(tmp_path / "whole", cut) and history(tmp_path / "whole") == history(cut)
    assert history(cut)[-1]["step"] == 2 * 4, "steps are of 24 images; there are as many as without the flag"
    with pytest.raises(UserError, match="relation_batch 24, this one has 36"):
        distill([*flags_of(image_folder, teacher_run, cut), *more, "--relation_batch", "36"])


def test_a_classifier_takes_a_pass_in_large_steps(image_folder, tmp_path, capsys):
    flags = ["--task", "classification", "--dataset", "folder", "--base", "resnet8_x0.25:stem_stride=2", "--batch", "8"]
    flags += [
        "--relation_batch",
        "32",
        "--epochs",
        "1",
        "--data",
        str(image_folder),
        "--save_dir",
        str(tmp_path / "run"),
    ]
    train([*flags, "--dry_run"])
    assert "one step:" in capsys.readouterr().out
    train(flags)
    assert history(tmp_path / "run")[-1]["step"] == 2, "48 images are one step of 32 and one of 16"
    state = read_checkpoint(tmp_path / "run" / "best.pth")["model"]
    assert [int(v) for k, v in state.items() if k.endswith("num_batches_tracked")][0] == 6, "one for each 8 images"


def test_out_of_memory_says_what_is_too_large():
    built = task("rkd_distance:1")
    output, compare = built.student_output, built.compare

    def limited(count, limit):
        if count > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    data = part(batch(1, 24), torch.argsort(batch(1, 24).labels))  # a chunk is mostly of one class
    for limit, said in (
        (6, "and not over 6; run with --batch 6 and the same --relation_batch."),
        (5, "and not over 4; run with --batch 4 and the same --relation_batch."),
        (1, "and over 2; use a smaller --base, --input_size or --batch."),
    ):
        built.student_output = lambda whole, limit=limit: (limited(len(whole.labels), limit), output(whole))[1]
        with pytest.raises(UserError) as caught:
            stepping(built, chunk=12).trial_step(data)
        assert str(caught.value) == f"the networks are out of memory over 12 images {said}"
    built.student_output = output
    built.compare = lambda student, teacher, whole: (limited(len(whole.labels), 12), compare(student, teacher, whole))[
        1
    ]
    with pytest.raises(UserError, match="the networks take 12 at a time: .*; lower --relation_batch."):
        stepping(built, chunk=12).trial_step(batch(1, 24))


def test_out_of_memory_of_several_processes_names_flags_that_go_together(monkeypatch):
    monkeypatch.setattr(memory, "world_size", lambda: 2)
    built = task("rkd_distance:1")
    for chunk in (12, 0):
        sentence = memory.way_out(built, batch(1, 24), None, Settings(1, 4, 0.1, chunk=chunk))
        assert sentence.startswith(
            "a step over 48 images, of which each of 2 processes takes 12" if chunk else "a batch of 48"
        )
        assert ("--accumulate" in sentence) == (not chunk) and ("--relation_batch" in sentence) == bool(chunk)


# Two processes.

SHARED = {**CASES, "together": ["rkd:1", "l2_triplet:1,sample=distance", "st:1", "fitnet:1"]}
del SHARED["a stage of preactivations"]  # its connectors normalise by a process's share, as without the flag


def work(rank, port, folder):
    torch.set_num_threads(int(THREADS))
    os.environ["METRIC_KD_KERNELS"] = "off"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start(CPU)
    found = {case: gradients(task(*specs), batch(1), share=True, chunk=3) for case, specs in SHARED.items()}
    waits, no_sync = [], DistributedDataParallel.no_sync
    DistributedDataParallel.no_sync = lambda module: (waits.append(1), no_sync(module))[1]
    found["accumulated"] = gradients(
        task(*SHARED["together"]), [batch(1), batch(2, 8), batch(3, 12)], share=True, accumulate=3
    )
    found["waits"] = len(waits)
    found["averaged"] = averaged(rank)
    torch.save(found, folder / f"{rank}.pt")
    distributed.stop()


def averaged(rank):
    """Of a gradient that both have, one that one has, and one that none has; of two dtypes."""
    parameters = [torch.nn.Parameter(torch.zeros(2, 2, dtype=t)) for t in (torch.float32, torch.float64, torch.float32)]
    parameters[0].grad = torch.full((2, 2), float(rank))
    if rank == 1:
        parameters[1].grad = torch.ones(2, 2, dtype=torch.float64)
    average_gradients(parameters)
    return [p.grad for p in parameters]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    template.ready()
    start_processes(work, (free_port(), folder), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", [*SHARED, "accumulated"])
def test_two_processes_give_the_gradient_of_one_with_the_whole_batch(pair, case):
    """A process has 8 of the 16 images, and takes 3 at a time."""
    if case == "accumulated":
        expected = gradients(task(*SHARED["together"]), [batch(1), batch(2, 8), batch(3, 12)], accumulate=3)
    else:
        expected = gradients(task(*SHARED[case]), batch(1))
    for findings in pair:
        assert_equal(findings[case], expected, 1e-9)
        assert findings["waits"] == 2, "gradients are exchanged after the last of three batches"


def test_gradients_that_one_process_lacks_count_as_zero(pair):
    for findings in pair:
        both, one, none = findings["averaged"]
        assert torch.equal(both, torch.full((2, 2), 0.5)) and torch.equal(one, torch.full((2, 2), 0.5, dtype=one.dtype))
        assert none is None
