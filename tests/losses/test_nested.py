"""--nested: losses of prefixes against a loop by hand, what is refused, and a run from its flags to its table."""

import json

import pytest
import torch
from killing import Killed, history, kill_at, same
from small_steps import LABELS, batch, network, part
from tiny import TINY

import metric_kd.functional as KD
from metric_kd.cli.distill import main as distill
from metric_kd.cli.main import main as console
from metric_kd.cli.nested import prefixes_of
from metric_kd.cli.parse import parse
from metric_kd.engine.tasks import Solo
from metric_kd.errors import UserError
from metric_kd.losses.nested import prefix
from metric_kd.losses.objective import Objective, parse_loss


def task(*specs, nested=(2, 5), unit=True):
    student, teacher = network(":width=4", 8, 0, unit), network(":width=6", 12, 1, unit)
    torch.manual_seed(2)
    built = Solo(student, teacher, Objective([parse_loss(spec) for spec in specs], nested, unit))
    built.build(part(batch(0), slice(2)), 4, LABELS)
    teacher.double()
    return built.double()


@pytest.mark.parametrize("unit", [True, False])
def test_values_and_gradients_by_a_loop_over_prefixes(unit):
    """A relation, a supervised loss of the labels, and one of logits, which counts once."""
    built, data = task("rkd_distance:3", "rkd_angle:2", "st:5", unit=unit), batch(1)
    built.train()
    total, values = built(data)
    total.backward()
    found = {name: p.grad.clone() for name, p in built.student.named_parameters() if p.grad is not None}
    built.zero_grad()

    output = built.student(data.images, want=("embedding", "logits"))
    with torch.no_grad():
        teacher = built.teacher(data.images, want=("embedding", "logits"))
    parts = [output.embedding[:, :2], output.embedding[:, :5], output.embedding]
    parts = [x / x.norm(dim=1, keepdim=True) if unit else x for x in parts]
    distance = sum(KD.rkd_distance(x, teacher.embedding) for x in parts) / 3
    angle = sum(KD.rkd_angle(x, teacher.embedding) for x in parts) / 3
    st = built.objective.terms["st"](output, teacher, data)
    (3 * distance + 2 * angle + 5 * st).backward()
    for name, value in (("rkd_distance", distance), ("rkd_angle", angle), ("st", st)):
        assert float(values[name]) == pytest.approx(value.item(), rel=1e-12)
    own = {name: p.grad for name, p in built.student.named_parameters() if p.grad is not None}
    assert own.keys() == found.keys() and any(g.abs().max() > 1e-6 for g in own.values())
    for name, gradient in own.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)


def test_supervised_losses_see_prefixes():
    built, data = task("l2_triplet:1,sample=all"), batch(1)
    built.train()
    embedding = built.student(data.images).embedding
    term = built.objective.terms["l2_triplet"]
    by_hand = []
    for length in (2, 5, 8):
        output = built.student(data.images)._replace(embedding=prefix(embedding, length, True))
        by_hand.append(term(output, None, data).item())
    assert built(data)[0].item() == pytest.approx(sum(by_hand) / 3, rel=1e-12)
    assert len(set(by_hand)) == 3


def test_without_prefixes_nothing_changes():
    one, other = task("rkd:1", nested=()), task("rkd:1", nested=(2,))
    assert one(batch(1))[0].item() != other(batch(1))[0].item()
    x = torch.randn(3, 4)
    assert prefix(x, 4, True) is x and torch.equal(prefix(x, 2, False), x[:, :2])
    assert torch.equal(prefix(torch.zeros(2, 4), 2, True), torch.zeros(2, 2))


@pytest.mark.parametrize(
    "specs, says",
    [
        (["cross_entropy:1"], "trained part or a memory"),
        (["csd:1", "rkd:1"], "equal lengths|--embedding_size 12"),
        (["regression:1,map=linear"], "trained part"),
        (["regression:1"], "trained part"),
        (["st:1"], "needs a loss of the embedding"),
        (["rkd:1", "crd:1,negatives=3"], "runs the networks itself"),
    ],
)
def test_losses_that_have_no_prefixes(specs, says):
    with pytest.raises(UserError, match=says):
        task(*specs)


def test_prefixes_that_are_none():
    with pytest.raises(UserError, match="no shorter than the embedding, of 8"):
        task("rkd:1", nested=(2, 8))
    config = parse("train", ["--nested", "32,16,32", "--embedding_size", "32"]).config
    assert prefixes_of(config) == (16,)
    for text in ("16,x", "0,4", "", "-3"):
        with pytest.raises(UserError, match="no list of lengths"):
            prefixes_of(parse("train", [f"--nested={text}"]).config)


def flags(data, teacher, run, *more):
    return [*TINY, "--data", str(data), "--teacher_load", str(teacher), "--save_dir", str(run), "--save_minutes", "0",
            "--loss", "rkd_distance:1", "--nested", "2,4,8", "--recall", "1", "2", *more]  # fmt: skip


def test_a_run_and_its_table(image_folder, teacher_run, tmp_path, monkeypatch, capsys):
    run, cut = tmp_path / "run", tmp_path / "cut"
    distill(flags(image_folder, teacher_run, run))
    last = history(run)[-1]
    nested = {key: value for key, value in last.items() if "[:" in key}
    assert set(nested) == {f"recall@{k}[:{n}]" for k in (1, 2) for n in (2, 4)}
    rows = [line.split() for line in (run / "result.txt").read_text().splitlines()[-4:]]
    assert rows[0] == ["dimensions", "bytes", "Recall@1", "Recall@2"]
    for row, length in zip(rows[1:], (2, 4, 8), strict=True):
        names = [f"recall@{k}" if length == 8 else f"recall@{k}[:{length}]" for k in (1, 2)]
        assert row == [str(length), str(4 * length), *(f"{100 * last[name]:.2f}" for name in names)]
    assert json.loads((run / "card.json").read_text())["metrics"]["best"]["recall@1[:2]"] == last["recall@1[:2]"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(6, patch)
        distill(flags(image_folder, teacher_run, cut))
    distill(flags(image_folder, teacher_run, cut))
    assert same(run, cut) and history(cut) == history(run)
    capsys.readouterr()
    assert console(["eval", str(run)]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-4:]] == rows
    assert console(["eval", str(teacher_run), "--nested", "3"]) == 0, "any network has prefixes"
    assert capsys.readouterr().out.splitlines()[-2].split()[:2] == ["3", "12"]


def test_what_the_command_refuses(image_folder, teacher_run, tmp_path, capsys):
    run = flags(image_folder, teacher_run, tmp_path / "run")
    for more, says in (
        (["--nested", "9"], "--nested 9 is longer than --embedding_size 8"),
        (["--nested", "2;4"], "no list of lengths"),
        (["--task", "classification"], "--nested is of embeddings"),
        (["--loss", "cross_entropy:1"], "'cross_entropy' keeps a trained part"),
        (["--embedding_size", "0", "--nested", "4096"], "no shorter than the embedding"),
    ):
        assert console(["distill", *run, *more]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
