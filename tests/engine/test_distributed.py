"""Several processes do what one would: the same gradients, the same evaluation, the same run; and none waits for the dead.

The workers are started once for each number of processes and go through everything; the tests read what they left.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import template
import torch
import torch.distributed as dist
from tiny import ROOT, THREADS, TINY, write_images
from torch import nn
from torch.multiprocessing import start_processes

import metric_kd.distill  # noqa: F401 (registers the methods)
from metric_kd import distributed
from metric_kd.cli.main import ALONE
from metric_kd.cli.main import main as metric_kd
from metric_kd.cli.making import synchronise
from metric_kd.cli.parse import parse
from metric_kd.cli.plugins import load_plugins
from metric_kd.cli.train import main
from metric_kd.data.batches import ClassBalancedBatches, ShuffledBatches
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords
from metric_kd.data.transforms import Geometry
from metric_kd.distill.connectors import Norm
from metric_kd.distill.granularity import CodedTeacher, Encoders
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.coding import Coding, coders_for
from metric_kd.engine.gathering import GatheredMaps
from metric_kd.engine.mutual import Mutual
from metric_kd.engine.optimisation import Settings
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.tasks import Solo
from metric_kd.engine.trainer import Trainer
from metric_kd.errors import UserError
from metric_kd.evaluation.classification import evaluate_classification
from metric_kd.evaluation.embed import embed
from metric_kd.losses import pml
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.losses.samplers import SAMPLERS
from metric_kd.losses.term import TERMS
from metric_kd.models.network import NetworkSpec, build_network
from metric_kd.types import Batch

pytestmark = pytest.mark.timeout(600)
CPU = torch.device("cpu")
PLUGIN = """
import os
import torch
from torch import nn
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.models.backbone import BACKBONES, Backbone
from metric_kd.types import Output

class Plain(Backbone):
    '''Three stages without batch statistics and without kinks, so that P processes can equal one to 1e-9.'''

    input_size = 12
    provides = frozenset({"pooled", "maps", "preacts"})

    def __init__(self, width: int = 4):
        super().__init__()
        self.pooled_size = 2 * width
        widths = (3, width, width, 2 * width, 2 * width)
        pairs = list(zip(widths, widths[1:]))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=1 + (k == 2), padding=1) for k, (a, b) in enumerate(pairs))
        self.norms = nn.ModuleList(nn.GroupNorm(2, b) for _, b in pairs)

    def forward(self, images, want=("pooled",)):
        maps, preacts = [], []
        for conv, norm in zip(self.convs, self.norms):
            preacts.append(norm(conv(maps[-1] if maps else images)))
            maps.append(torch.nn.functional.softplus(preacts[-1]))
        return Output(tuple(maps), tuple(preacts), maps[-1].mean((2, 3)))

BACKBONES.register("plain")(Plain)

@TERMS.register("stopper")
class Stopper(Term):
    '''Nothing, but for the step at which it stops the run.'''

    calls = 0

    def forward(self, student, teacher, batch):
        Stopper.calls += 1
        if Stopper.calls == int(os.environ.get("STOP_AT", 0)):
            raise UserError("enough; go on.")
        return student.embedding.sum() * 0.0
"""

METHODS = [n for n in TERMS if TERMS[n].reads_teacher and TERMS[n].__module__.startswith("metric_kd.distill.")]
TRIPLETS = [f"{loss}:1,sample={sample}" for loss in ("l1_triplet", "l2_triplet", "contrastive") for sample in SAMPLERS]
OPTIONS = {"crd": "crd:1,negatives=3"}
MORE = """crd:1,negatives=3,mode=relax dark_rank:1,normalise=true irg:1,preset=paper irg:1,preset=caffe irg:1,mode=all_to_all
    rkd:1,angle=0 sp:1,features=embedding sp:1,layers=1/3""".split()
RELATED = sorted(n for n in METHODS if TERMS[n].relates)
PER_PROCESS = ("bss", "ofd")
"""Methods that also look at a process's share as a whole: the images worth an attack, the mean of negative responses."""
LOCAL = sorted(n for n in METHODS if not TERMS[n].relates and n not in (*PER_PROCESS, "dml"))
LIBRARY = (
    """pml.ArcFaceLoss:1 pml.DynamicSoftMarginLoss:1 pml.MultiSimilarityLoss:1 pml.NPairsLoss:1 pml.ProxyAnchorLoss:1
    pml.RankedListLoss:1,margin=1,Tn=1 pml.TripletMarginLoss:1""".split()
    if pml.names()
    else []
)
"""Pairs, triplets, own parameters, a histogram that is kept between steps: of one class, so a few stand for all."""
TOGETHER = ["rkd:1", "l2_triplet:1,sample=distance", "st:1", "contrastive:1,sample=random", "cross_entropy:1"]
"""Terms that see all of a batch and terms that see a share of it, side by side, two of them drawing."""
SPECS = [OPTIONS.get(n, f"{n}:1") for n in RELATED] + MORE + TRIPLETS + LIBRARY
SPECS += [f"{n}:1" for n in LOCAL] + ["cross_entropy:1"]
COMPARED = {2: [*SPECS, "together", "peers", "coders"]}
COMPARED[4] = [OPTIONS.get(n, f"{n}:1") for n in RELATED] + MORE + TRIPLETS + LIBRARY + ["together", "peers", "coders"]
COMPARED[1] = COMPARED[2]
LABELS = torch.arange(48) % 4


def network(width, size, seed, classes=4):
    torch.manual_seed(seed)
    return build_network(NetworkSpec(f"plain:width={width}", size, False, 12, num_classes=classes))


def batch(step):
    """16 images, in an order in which a share of four holds one class only."""
    draw = torch.Generator().manual_seed(step)
    rows = torch.randperm(48, generator=draw)[:16]
    rows = rows[LABELS[rows].argsort()]
    images = torch.randint(0, 256, (48, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    return Batch(images[rows], LABELS[rows], rows)


def built(case):
    # A student in the teacher's own space has its width.
    student, teacher = network(4, 8, 0), network(4, 8 if case.startswith("csd") else 12, 1)
    torch.manual_seed(2)
    if case == "peers":
        losses = [parse_loss(spec) for spec in [*TOGETHER, "dml:1", "sp:1", "granularity:1"]]
        encoders = {name: Encoders(8, 4, 8) for name in ("student", "peer")}
        task = Mutual({"student": student, "peer": network(4, 12, 1)}, losses, encoders=encoders)
    elif case == "coders":
        task = Coding(coders_for(teacher, "embedding", 4, 8), teacher.double())
    else:
        losses = [parse_loss(spec) for spec in (TOGETHER if case == "together" else [case])]
        if not TERMS[losses[0].name].acts_in_main:
            losses.append(parse_loss("cross_entropy:1"))
        if losses[0].name == "granularity":
            teacher = CodedTeacher(teacher, coders_for(teacher, "logits", 4, 8))
        if losses[0].name == "imitate":
            losses = [parse_loss("imitate:1,layer=logits")]
        task = Solo(student, teacher, Objective(losses))
    if case != "coders":
        task.build(Batch(*(t if t is None else t[:2] for t in batch(0))), 4, LABELS)
        teacher.double()
    return task.double()


def gradients(case):
    """Of a step in every stage, as the trainer takes it: values, gradients, and what the terms remember for a second."""
    task = built(case)
    settings = Settings(epochs=1, iterations=2, lr=0.05, optimizer="sgd", weight_decay=0.0, seed=3)
    trainer = Trainer(task, settings, RunDirectory("."), None, None, CPU)
    steps = (1, 2) if any(name.startswith("crd") for name in task.loss_names) or case in LIBRARY else (1,)
    share = 16 // distributed.world_size()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    found = {}
    for stage in range(len(trainer.stages)):
        trainer.enter_stage(stage)
        trainer._wrap()
        for step in steps:
            values = trainer.trial_step(Batch(*(None if t is None else t[mine] for t in batch(step))))
            found |= {
                f"{stage} {step} {name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()
            }
            found |= {f"{stage} {step} {n}": p.grad for n, p in task.named_parameters() if p.grad is not None}
    return found | {name: buffer for name, buffer in task.named_buffers() if buffer.is_floating_point()}


def pixels(count):
    draw = np.random.default_rng(4)
    return ImageRecords(
        "drawn", draw.integers(0, 4, count), tuple("abcd"), pixels=draw.integers(0, 256, (count, 12, 12, 3), np.uint8)
    )


def evaluated(count, batch_size):
    """Embeddings and accuracies, of statistics that differ from process to process before."""
    net = network(4, 8, 0)
    net.register_buffer("own", torch.tensor(float(distributed.rank())))
    loader = ImageLoader(pixels(count), Geometry(input_size=12, flip=False))
    part = (distributed.rank(), distributed.world_size())
    vectors = embed(net, loader.test(batch_size, part), shared=True)
    with torch.no_grad():  # ties, whose credits are fractions
        net.classifier.weight[1:3] = net.classifier.weight[0]
        net.classifier.bias[1:3] = net.classifier.bias[0]
    accuracy = evaluate_classification(net, loader.test(batch_size, part), ks=(1, 2), shared=True)
    return {"vectors": vectors, "accuracy": accuracy, "own": net.own}


def run_flags(data, run, plugin, *more):
    return [
        *TINY, "--base", "plain", "--data", str(data), "--save_dir", str(run), "--plugins", str(plugin), "--save_minutes", "0",
        "--loss", "l2_triplet:1,sample=distance", "--loss", "cross_entropy:1",
        "--loss", "stopper:1", *more,
    ]  # fmt: skip


def stopped(arguments, step):
    """What the run says that ends in this step."""
    os.environ["STOP_AT"] = str(step)
    sys.modules["metric_kd_plugin_plain"].Stopper.calls = 0
    try:
        main(arguments)
    except UserError as error:
        return str(error)
    finally:
        del os.environ["STOP_AT"]
    return ""


def evaluations():
    return {(count, size): evaluated(count, size) for count, size in ((13, 3), (12, 4), (5, 5))}


def draws():
    """What is drawn in common, what each draws on its own, and what is drawn in common after that."""
    torch.manual_seed(distributed.rank())
    distributed.seed_common(5)
    with distributed.common_draws(CPU):
        first = torch.rand(2)
    own = torch.rand(2)
    with distributed.common_draws(CPU):
        second = torch.cat([torch.rand(2), torch.tensor(np.random.rand(1), dtype=torch.float32)])
    return first, own, second


def complaint(action):
    try:
        action()
    except RuntimeError as error:
        return distributed.lost(error)
    return "nothing was wrong"


def work(rank, world, port, folder, data):
    """What every process of a group does."""
    torch.set_num_threads(int(THREADS))
    os.environ["METRIC_KD_KERNELS"] = "off"  # what they give is the same, and their compiler takes seconds to load
    plugin = folder / "plain.py"
    load_plugins([str(plugin)])
    found = {}
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        distributed.start(CPU)
    found["gradients"] = {case: gradients(case) for case in COMPARED[world]}
    found["evaluated"] = evaluations()
    found["draws"] = draws()
    if world == 1:
        main(run_flags(data, folder / "one", plugin))
        main(run_flags(data, folder / "boundary", plugin, "--epochs", "1"))
        found["stopped"] = stopped(run_flags(data, folder / "within", plugin), 3)
        shutil.copytree(folder / "within", folder / "uneven")
        state = read_checkpoint(folder / "uneven" / "last.pth")
        state["position"]["of"] = 5
        torch.save(state, folder / "uneven" / "last.pth")
        found["uneven"] = stopped(run_flags(data, folder / "uneven", plugin), 0)
    if world == 2:
        main(run_flags(data, folder / "two", plugin))
        main(run_flags(data, folder / "boundary", plugin))
        main(run_flags(data, folder / "within", plugin))
        found["blind"] = blind(data, folder, plugin)
        found["late"] = complaint(lambda: late(rank))
        found["dead"] = complaint(lambda: dead(rank))
    torch.save(found, folder / f"{world}-{rank}.pt")


def blind(data, folder, plugin):
    """One process does not see what the others see, as on machines without common files."""
    own = folder / "two" if distributed.is_main() else folder / "elsewhere"
    task = built("rkd:1")
    batches = ShuffledBatches(24, 12, 0)
    trainer = Trainer(task, Settings(1, 2, 0.1), RunDirectory(own), None, batches, CPU)
    try:
        trainer.resume()
    except UserError as error:
        return str(error)
    return ""


def late(rank):
    """The second process does not come."""
    group = dist.new_group(timeout=distributed.timedelta(seconds=1))
    if rank == 0:
        dist.all_reduce(torch.zeros(1), group=group)


def dead(rank):
    """The second process leaves."""
    if rank == 1:
        dist.destroy_process_group()
    else:
        dist.all_reduce(torch.zeros(1))


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What the processes left: {number of processes: [their findings]}, and the folder of their runs."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers of xdist share one folder; the first to come fills it
        root = root.parent
    folder = root / "groups"
    with (root / "groups.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            data = write_images(folder / "images", classes=8, per_class=8)
            (folder / "plain.py").write_text(PLUGIN)
            template.ready()
            for world in (1, 2, 4):
                start_processes(work, (world, free_port(), folder, data), nprocs=world, start_method="forkserver")
            (folder / "done").touch()
    read = {w: [torch.load(folder / f"{w}-{rank}.pt", weights_only=False) for rank in range(w)] for w in (1, 2, 4)}
    return read, folder


def assert_equal(ours, theirs, rtol):
    """Up to the rounding of gradients that are zero: that of a bias, for a loss of distances."""
    assert ours.keys() == theirs.keys()
    rounding = 1e-13 * max(value.abs().max() for value in theirs.values() if value.numel())
    for name, value in theirs.items():
        gap = (ours[name] - value).abs().max() if value.numel() else 0
        assert gap <= rtol * value.abs().max() + rounding, f"{name} differs by {gap:g}"


@pytest.mark.parametrize("world, case", [(world, case) for world in (2, 4) for case in COMPARED[world]])
def test_gradients_are_those_of_one_process_with_the_whole_batch(left, world, case):
    found, _ = left
    expected = found[1][0]["gradients"][case]
    assert any(value.abs().max() > 0 for name, value in expected.items() if "weight" in name)
    for process in (0, world - 1):
        # sobolev differentiates by images, which are float32 whatever the networks are.
        assert_equal(found[world][process]["gradients"][case], expected, 1e-6 if case == "sobolev:1" else 1e-9)


def test_every_loss_is_either_compared_or_known_to_look_at_a_share():
    compared = {spec.partition(":")[0] for spec in SPECS}
    assert compared | {*PER_PROCESS, "dml"} >= {
        name for name in TERMS if TERMS[name].__module__.startswith("metric_kd.")
    }
    assert {name for name in METHODS if TERMS[name].family == "relational"} == set(RELATED)
    relating = {name for name in TERMS if TERMS[name].relates and TERMS[name].__module__ != "metric_kd.losses.pml"}
    for world in (2, 4):
        assert {spec.partition(":")[0] for spec in COMPARED[world]} >= relating


@pytest.mark.parametrize("world", [2, 4])
def test_evaluation_is_exactly_that_of_one_process(left, world):
    """Parts are uneven, and with four processes some are empty."""
    found, _ = left
    for key, expected in found[1][0]["evaluated"].items():
        ours = found[world][0]["evaluated"][key]
        assert len(expected["vectors"].vectors) == key[0]
        for mine, other in zip(ours["vectors"], expected["vectors"], strict=True):
            assert mine.dtype == other.dtype and torch.equal(mine, other)
        assert all(found[world][p]["evaluated"][key]["accuracy"] == expected["accuracy"] for p in range(world))
        assert found[world][-1]["evaluated"][key]["own"] == 0, "the main process's statistics are used"
        assert not any(len(part) for part in found[world][-1]["evaluated"][key]["vectors"])


@pytest.mark.parametrize("count, size", [(13, 3), (12, 4), (5, 5), (1, 8)])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_of_the_test_images_are_all_of_them_in_order(count, size, parts):
    loader = ImageLoader(pixels(count), Geometry(input_size=12, flip=False))
    whole = [b.indices.tolist() for b in loader.test(size)]
    assert [b.indices.tolist() for part in range(parts) for b in loader.test(size, (part, parts))] == whole


def test_common_draws_are_common_and_leave_the_own_ones_alone(left):
    found, _ = left
    first, own, second = found[2][0]["draws"]
    assert not torch.equal(first, second[:2])
    for other in (found[2][1]["draws"], *(findings["draws"] for findings in found[4])):
        assert torch.equal(other[0], first) and torch.equal(other[2], second)
    for number, findings in enumerate(found[4]):
        torch.manual_seed(number)
        assert torch.equal(findings["draws"][1], torch.rand(2))
    assert torch.equal(found[1][0]["draws"][0], torch.rand(2, generator=torch.Generator().manual_seed(0)))


def test_the_threads_of_a_group_end_with_it_although_a_cycle_holds_it():
    """One that still drops a tensor while Python ends would abort a process that has done its work."""
    code = (
        "import os, torch, torch.distributed as dist\n"
        "from metric_kd import distributed\n"
        f"dist.init_process_group('gloo', init_method='tcp://127.0.0.1:{free_port()}', rank=0, world_size=1)\n"
        "dist.all_reduce(torch.zeros(1))\n"
        "class Held: pass\n"
        "held = Held()\n"
        "held.me, held.group = held, dist.group.WORLD\n"
        "del held\n"
        "def threads(): return [open(f'/proc/self/task/{t}/comm').read().strip() for t in os.listdir('/proc/self/task')]\n"
        "assert any('gloo' in name for name in threads())\n"
        "distributed.stop()\n"
        "assert not any('gloo' in name for name in threads()), threads()\n"
    )
    done = template.completed(template.Forked(template.code, code, cwd=ROOT))
    assert done.returncode == 0, done.stderr


def test_one_process_is_left_alone():
    x = torch.randn(3, 2)
    assert distributed.all_gather(x) is x and distributed.average(x) is x and distributed.gather_rows(x, CPU) is x
    torch.manual_seed(1)
    distributed.seed_common(9)
    with distributed.common_draws(CPU):
        drawn = torch.rand(2)
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(1)))


def numbers(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("run", ["two", "boundary", "within"])
def test_runs_of_two_processes_and_runs_that_change_their_number_end_alike(left, run):
    """In float32, with triplets that are drawn: one process; two; one and then two, between epochs and within one."""
    _, folder = left
    ours, theirs = (read_checkpoint(folder / name / "best.pth")["model"] for name in (run, "one"))
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-5) for key in theirs)
    assert read_checkpoint(folder / run / "last.pth")["environment"]["processes"] == (1 if run == "one" else 2)
    for mine, other in zip(numbers(folder / run), numbers(folder / "one"), strict=True):
        assert mine["step"] == other["step"] and mine["losses"] == pytest.approx(other["losses"], rel=1e-3, abs=1e-6)
        assert mine["recall@1"] == pytest.approx(other["recall@1"], abs=1 / 32 + 1e-9)


def test_a_run_that_cannot_go_on_is_refused_with_the_reason(left):
    found, _ = left
    assert found[1][0]["stopped"] == "enough; go on."
    assert re.search(r"within an epoch of 5 steps .* an epoch has 4; start as many processes", found[1][0]["uneven"])
    assert all("put --save_dir where all machines see the same files." in f["blind"] for f in found[2])


def test_who_waits_in_vain_is_told(left):
    found, _ = left
    for what in ("late", "dead"):
        sentence = found[2][0][what]
        assert re.match(r"another process of this run died or did not answer in time \([^/]+\); see .*\.$", sentence), (
            sentence
        )


def test_errors_of_one_process_are_its_own(monkeypatch):
    closed = RuntimeError("[/home/gloo/pair.cc:5] Connection closed by peer [::1]:5.\nmore")
    assert distributed.lost(closed) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "in time (Connection closed by peer [::1]:5); see" in (distributed.lost(closed) or "")
    wordy = RuntimeError("Connection closed by peer [::1]:5. This is typically caused by a crash. Check the logs.")
    assert "in time (Connection closed by peer [::1]:5); see" in (distributed.lost(wordy) or "")
    early = RuntimeError(
        "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:5"
    )
    assert "in time (Gloo connectFullMesh failed with Connection closed by peer [::1]:5); see" in (
        distributed.lost(early) or ""
    )
    assert distributed.lost(RuntimeError("shape")) is None
    assert distributed.lost(UserError("Connection closed by peer")) is None


def test_who_speaks_is_known_before_the_processes_meet(monkeypatch, capsys):
    assert distributed.is_main() and distributed.announced() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", number)
        assert distributed.is_main() is speaks and distributed.world_size() == 1
    for name in ALONE:
        assert metric_kd([name]) == 2
        assert f"error: {name} works in one process; start it without torchrun." in capsys.readouterr().err


def test_what_cannot_be_shared_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "5")
    flags = [*TINY, "--data", str(tmp_path / "nothing"), "--save_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"--batch 12 is shared by 5 processes; make it a multiple of 5\.$"):
        main(flags)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="batches have 3 images for 4 processes"):
        ClassBalancedBatches(np.array([0, 0, 1]), 4, 2, 5, seed=0, rank=3, world=4, pairs=False)


def test_patience(monkeypatch):
    assert distributed.patience().total_seconds() == 1800
    monkeypatch.setenv("METRIC_KD_TIMEOUT", "0.5")
    assert distributed.patience().total_seconds() == 30
    for wrong in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("METRIC_KD_TIMEOUT", wrong)
        with pytest.raises(UserError, match="give minutes"):
            distributed.patience()


@pytest.mark.slow
def test_a_process_that_dies_stops_the_run_long_before_the_others_lose_patience(image_folder, tmp_path):
    plugin = tmp_path / "dying.py"
    plugin.write_text(
        "import os\n"
        "from metric_kd.losses.term import TERMS, Term\n"
        "@TERMS.register('dying')\n"
        "class Dying(Term):\n"
        "    calls = 0\n"
        "    def forward(self, student, teacher, batch):\n"
        "        Dying.calls += 1\n"
        "        if Dying.calls == 3 and os.environ['RANK'] == '1':\n"
        "            open(os.environ['DIED'], 'w').close()\n"
        "            os._exit(1)\n"
        "        return student.embedding.sum() * 0.0\n"
    )
    died = tmp_path / "died"
    arguments = [
        *TINY,
        "--data",
        image_folder,
        "--save_dir",
        tmp_path / "run",
        "--plugins",
        plugin,
        "--loss",
        "dying:1",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "run.py",
            *map(str, arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": THREADS, "DIED": str(died)},
        capture_output=True,
        text=True,
        timeout=200,  # a tenth of how long they wait for a process that hangs
    )
    assert done.returncode != 0 and died.exists()
    assert "error: another process of this run died or did not answer in time" in done.stderr, done.stderr[-2000:]
    assert done.stderr.count("Traceback") <= 1, "none but the launcher's own"


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("count", [60, 63])
def test_ranks_share_the_batches_of_one_process(world, count):
    """Disjoint shares, together the batch of one process in its order, and the same again in another start."""
    labels = np.arange(count) % 6
    for epoch in (1, 2):
        whole = ClassBalancedBatches(labels, 12, 3, 5, seed=1).epoch(epoch)
        shares = [ClassBalancedBatches(labels, 12, 3, 5, 1, rank, world).epoch(epoch) for rank in range(world)]
        for number, batch_of_one in enumerate(whole):
            assert np.array_equal(np.concatenate([share[number] for share in shares]), batch_of_one)
            assert len(set(batch_of_one.tolist())) == 12
        shares = [ShuffledBatches(count, 12, 1, rank, world).epoch(epoch) for rank in range(world)]
        for number, batch_of_one in enumerate(ShuffledBatches(count, 12, 1).epoch(epoch)[: len(shares[0])]):
            together = np.concatenate([share[number] for share in shares])
            assert np.array_equal(together, batch_of_one[: len(batch_of_one) // world * world])


def test_the_script_for_several_machines_starts_commands_that_there_are(tmp_path):
    """With a torchrun that only says how it was started."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOST": "first", "NODES": "4", "GPUS": "8"}
    script = ROOT / "examples" / "multi_node.sh"
    said = subprocess.run([script], env=own, capture_output=True, text=True, check=True).stdout.splitlines()
    configs = []
    for line, (command, name) in zip(said, (("train", "run.py"), ("distill", "run_distill.py")), strict=True):
        launcher, _, flags = line.partition(f" {name} ")
        assert "--nnodes 4 --nproc_per_node 8" in launcher and "--rdzv_endpoint first:29500" in launcher
        configs.append(parse(command, flags.split()).config)
    teacher, student = configs
    assert student.teacher_load == teacher.save_dir and teacher.batch % 32 == student.batch % 32 == 0
    assert "give HOST" in subprocess.run([script], env={**own, "HOST": ""}, capture_output=True, text=True).stderr


def test_synchronised_statistics_need_cuda_and_say_so_before_any_work(tmp_path):
    missing = tmp_path / "nothing"
    flags = [*TINY, "--data", str(missing), "--sync_bn", "true", "--save_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"--sync_bn needs CUDA, .* for the CPU; leave it out\.$"):
        main(flags)
    assert not (tmp_path / "run").exists()


def test_synchronised_statistics_reach_every_layer_and_keep_the_names(monkeypatch):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(Norm(4)))
    names = list(module.state_dict())
    synchronise(module)
    assert type(module[1]) is nn.BatchNorm2d, "one process has its whole batch"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    synchronise(module)
    assert isinstance(module[1], nn.SyncBatchNorm) and isinstance(module[2][0], nn.SyncBatchNorm)
    assert list(module.state_dict()) == names


def test_gathered_maps_read_what_is_asked_for(monkeypatch):
    asked = []

    def double(x):
        asked.append(float(x[0]))
        return torch.cat([x, x])

    monkeypatch.setattr("metric_kd.engine.gathering.all_gather", double)
    maps = GatheredMaps([torch.full((2,), float(k), requires_grad=True) for k in range(4)])
    assert len(maps) == 4 and maps and not asked
    assert [len(m) for m in maps[-2:]] == [4, 4] and asked == [2, 3]
    assert maps[-1] is maps[3] and maps.detach()[3].requires_grad is False and maps[3].requires_grad
    assert asked == [2, 3], "each is gathered once, for the constant form too"
    maps.detach()[0]
    assert maps[0].requires_grad and asked == [2, 3, 0]
    with pytest.raises(IndexError):
        maps[4]
