"""metric-kd compare: runs what is missing and nothing else, chooses weights on held-out data, refuses before it writes."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from tiny import ROOT

from metric_kd.cli import compare
from metric_kd.cli.comparison import read_comparison
from metric_kd.cli.config import known_keys
from metric_kd.cli.main import main as console
from metric_kd.engine.interruption import Interrupted
from metric_kd.errors import UserError

STUDENT = "resnet8_x0.25:stem_stride=2"
METHODS = {
    "st": ["cross_entropy:1", "st:0.5,temperature=4"],
    "at": {"loss": ["cross_entropy:1", {"name": "at", "weight": "{weight}"}], "weights": [10, 0.5]},
}


@pytest.fixture(scope="module")
def teacher(image_folder, tmp_path_factory):
    """A classifier of the folder's classes."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    flags = f"--task classification --dataset folder --data {image_folder} --base resnet8_x0.5:stem_stride=2"
    more = f"--batch 16 --epochs 1 --device cpu --save_dir {folder}"
    assert console(["train", *flags.split(), *more.split()]) == 0
    return folder


@pytest.fixture
def content(teacher, image_folder, tmp_path):
    """A small comparison as its file holds it."""
    return {
        "save_dir": str(tmp_path / "out"),
        "seeds": [0, 3],
        "common": {
            "task": "classification",
            "dataset": "folder",
            "data": str(image_folder),
            "base": STUDENT,
            "teacher_load": str(teacher),
            "batch": 16,
            "epochs": 2,
            "device": "cpu",
        },
        "control_epochs": 3,
        "methods": METHODS,
    }


@pytest.fixture
def call(tmp_path, content):
    """(file, start): ``start(flags)`` writes the comparison into the file and gives the exit status."""
    file = tmp_path / "compare.yaml"

    def start(*flags) -> int:
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return console(["compare", str(file), *flags])

    return start


@pytest.fixture
def made(monkeypatch):
    """Names of the runs that were really made."""
    runs = []

    def fit(command, parsed):
        runs.append(parsed.config.save_dir.split("/out/")[1])
        return original(command, parsed)

    original = compare.fit
    monkeypatch.setattr(compare, "fit", fit)
    return runs


def results(tmp_path):
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    return content, {row["name"]: row for row in content["rows"]}


@pytest.mark.slow
def test_a_comparison_from_start_to_page(call, content, made, tmp_path, capsys):
    assert call("--dry_run") == 0
    assert "4 runs to choose" not in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert call() == 0
    out = tmp_path / "out"
    searches = ["at/weight-10/seed0", "at/weight-0.5/seed0"]
    finals = [f"{row}/seed{seed}" for row in ("alone", "st", "control", "at") for seed in (0, 3)]
    assert sorted(made) == sorted(searches + finals), "the weights are tried on the first seed only"
    assert made.index("alone/seed3") < made.index("control/seed0"), "the control's length is known after these"
    printed = capsys.readouterr().out
    assert (out / "table.txt").read_text() in printed
    assert {"results.json", "comparison.png", "comparison.html"} <= {p.name for p in out.iterdir()}

    numbers, rows = results(tmp_path)
    top1 = {name: [run["metrics"]["top1"] for run in row["runs"].values()] for name, row in rows.items()}
    assert rows["st"]["result"]["mean"] == pytest.approx(np.mean(top1["st"]))
    gaps = np.subtract(top1["st"], top1["alone"])
    assert rows["st"]["against"]["alone"]["deviation"] == pytest.approx(gaps.std(ddof=1))
    assert set(rows["at"]["against"]) == {"alone", "st", "control"} and set(rows["st"]["against"]) == {
        "alone",
        "control",
    }

    held_out = {}
    for weight in ("10", "0.5"):
        lines = (out / "at" / f"weight-{weight}" / "seed0" / "metrics.jsonl").read_text().splitlines()
        held_out[weight] = max(json.loads(line)["val_top1"] for line in lines)
    assert rows["at"]["held_out"] == held_out
    assert rows["at"]["weight"] == max(held_out, key=held_out.get), "the first of equals"
    stored = yaml.safe_load((out / "at" / "seed3" / "config.yaml").read_text())
    assert stored["select"] == "last" and stored["seed"] == 3 and f"at:{rows['at']['weight']}" in stored["loss"]
    assert len(yaml.safe_load((out / "control" / "seed0" / "config.yaml").read_text())["loss"]) == 1

    made.clear()
    assert call() == 0 and made == [], "a finished comparison runs nothing"
    assert results(tmp_path)[0] == numbers
    shutil.rmtree(out / "st" / "seed3")
    assert call() == 0 and made == ["st/seed3"]
    again = results(tmp_path)[1]["st"]["runs"]["3"]
    assert again["metrics"] == rows["st"]["runs"]["3"]["metrics"], "from the stored start, so with the same result"

    content["methods"] = {**METHODS, "sp": ["cross_entropy:1", "sp:3000"]}
    content["seeds"] = [0]
    made.clear()
    assert call() == 0 and made == ["sp/seed0"], "a comparison grows"
    assert "+-" not in (out / "table.txt").read_text()
    content["common"]["epochs"] = 4
    content["control_epochs"] = 5
    capsys.readouterr()
    assert call() == 2 and "holds a run of 2 epochs" in capsys.readouterr().err


def test_a_stopped_comparison_goes_on(call, content, monkeypatch, tmp_path, capsys):
    content["methods"] = {"st": METHODS["st"]}
    content.pop("control_epochs")
    original, seconds = compare.fit, {"alone": 10.0, "st": 27.0}

    def stop(command, parsed):
        raise Interrupted(15)

    monkeypatch.setattr(compare, "fit", stop)
    assert call() == 128 + 15 and "the same command goes on" in capsys.readouterr().err

    def timed(command, parsed):
        """Pretend that a run took as long as its row should."""
        original(command, parsed)
        metrics = compare._directory(parsed).metrics
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        row = metrics.parent.parent.name
        metrics.write_text(
            "".join(json.dumps({**r, "seconds": seconds.get(row, 1) / len(lines)}) + "\n" for r in lines)
        )

    monkeypatch.setattr(compare, "fit", timed)
    assert call() == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["control_epochs"] == 5 and plan["reference"] == "st", "2 epochs * 27 s / 10 s, rounded"
    card = json.loads((tmp_path / "out" / "control" / "seed0" / "card.json").read_text())
    assert card["epochs"] == 5
    notes = " ".join(results(tmp_path)[0]["notes"])
    assert "5 epochs, about the time of one run of st (27 s; an epoch alone 5.0 s)" in notes
    assert "st took longer than one of control" in notes
    seconds["st"] = 80.0
    shutil.rmtree(tmp_path / "out" / "st" / "seed0")
    assert call() == 0, "the plan is kept"
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == plan


def test_a_row_that_fails_does_not_stop_the_others(call, content, tmp_path, monkeypatch, capsys):
    content["methods"] = {**METHODS, "last": ["cross_entropy:1", "logits:0.1"]}
    original = compare.fit

    def fit(command, parsed):
        if "/st/" in parsed.config.save_dir or "/weight-10/" in parsed.config.save_dir:
            raise UserError("loss 'x' was not finite at step 3; lower --lr.")
        return original(command, parsed)

    monkeypatch.setattr(compare, "fit", fit)
    content["seeds"] = [0]
    content.pop("control_epochs")
    assert call() == 1
    _, rows = results(tmp_path)
    assert rows["st"]["failure"].startswith("loss 'x' was not finite") and rows["st"]["result"] is None
    assert "give control_epochs" in rows["control"]["failure"]
    assert rows["at"]["weight"] == "0.5" and rows["last"]["result"]["n"] == 1
    table = " ".join((tmp_path / "out" / "table.txt").read_text().split())
    assert "st failed: loss 'x'" in table and "at: weight 10 failed: loss 'x'" in table


def test_embeddings_and_peers(call, content, teacher_run, image_folder, tmp_path, made):
    common = {"base": STUDENT, "embedding_size": 8, "batch": 12, "num_image_per_class": 3, "iter_per_epoch": 2}
    shared = {key: content["common"][key] for key in ("dataset", "data", "device")}
    content["common"] = {**shared, **common, "epochs": 1, "recall": [2, 1], "teacher_load": str(teacher_run)}
    content |= {"seeds": [1], "control_epochs": 1}
    content["methods"] = {
        "rkd": {"loss": ["rkd_distance:1"]},
        "peers": {"loss": ["l2_triplet:1", "rkd_distance:1"], "mutual": [STUDENT]},
    }
    assert call() == 0
    numbers, rows = results(tmp_path)
    assert numbers["metric"] == "recall@2" and rows["alone"]["losses"][0].startswith("l2_triplet:1")
    assert made == ["alone/seed1", "rkd/seed1", "control/seed1", "peers/seed1"]
    assert any("trained along" in note for note in numbers["notes"])
    assert "Recall@2" in (tmp_path / "out" / "table.txt").read_text()


def test_rows_and_searches_share_the_teachers_cache_where_it_serves_them(call, content, tmp_path, capsys):
    content["common"] |= {"teacher_cache": str(tmp_path / "c.h5"), "views": 2, "epochs": 1}
    content |= {"seeds": [0], "control_epochs": 1}
    content["methods"] = {
        "st": {"loss": ["cross_entropy:1", "st:{weight}"], "weights": [1, 2]},
        "rkd": ["cross_entropy:1", "rkd:1"],
        "pkt": ["cross_entropy:1", "pkt:1"],
    }
    assert call("--dry_run") == 0 and not list(tmp_path.glob("*.h5")), "nothing was run"
    assert call() == 0, capsys.readouterr().err
    assert {file.name for file in tmp_path.glob("*.h5")} == {"c.h5", "c-logits.h5", "c-val-logits.h5"}
    numbers, rows = results(tmp_path)
    assert not any(row["failure"] for row in rows.values())
    assert any("the methods 2 fixed ones" in note for note in numbers["notes"])
    assert call() == 0, "nothing is left to run"


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"sedes": [0]}, "did you mean 'seeds'"),
        ({"save_dir": None}, "save_dir: runs/NAME"),
        ({"seeds": []}, "seeds: [0, 1, 2]"),
        ({"seeds": [0, 1, 0]}, "seeds names 0 twice"),
        ({"search_seeds": ["a"]}, "search_seeds is ['a']"),
        ({"common": None}, "common must be a map"),
        ({"common": {"epoch": 3}}, "did you mean 'epochs'"),
        ({"common": {"epochs": "many"}}, "--epochs"),
        ({"common": {"preset": "zo"}}, "did you mean 'zoo'"),
        ({"common": {"seed": 1}}, "list them under seeds"),
        ({"common": {"unlabelled": True}}, "must not hold unlabelled: the student is trained alone too"),
        ({"common": {"dist_ratio": 1}}, "under alone and methods"),
        ({"common": {"teacher_load": None}}, "names no teacher"),
        ({"common": {"teacher_load": "nowhere.pth"}}, "nowhere.pth does not exist"),
        ({"common": {"data": "nowhere"}}, "nowhere"),
        ({"methods": {}}, "methods must be a map"),
        ({"methods": {"alone": ["cross_entropy:1"]}}, "choose another name"),
        ({"methods": {"control": ["cross_entropy:1"]}}, "choose another name"),
        ({"methods": {"a/b": ["st:1"]}}, "becomes a folder"),
        ({"methods": {"st": []}}, "needs a list of losses"),
        ({"methods": {"st": {"loss": ["st:1"], "weight": [1]}}}, "did you mean 'weights'"),
        ({"methods": {"st": ["ts:1"]}}, "st: unknown loss 'ts'"),
        ({"methods": {"st": ["st:1,temprature=4"]}}, "did you mean 'temperature'"),
        ({"methods": {"st": ["st:{weight}"]}}, "list weights"),
        ({"methods": {"st": {"loss": ["st:1"], "weights": [1, 2]}}}, "no loss that takes one"),
        ({"methods": {"st": {"loss": ["st:{weight}"], "weights": [1, 1.0]}}}, "names one twice"),
        ({"methods": {"st": {"loss": ["st:{weight}"], "weights": [0, 1]}}}, "positive numbers"),
        ({"methods": {"st": {"loss": ["st:{weight}"], "weights": 3}}}, "positive numbers"),
        ({"methods": {"fit": ["fitnet:1,connector=none"]}}, "fit: "),
        ({"alone": ["st:1"]}, "alone: loss 'st' reads a teacher"),
        ({"control_epochs": 1}, "control_epochs is 1"),
    ],
)
def test_refusals_are_one_sentence_and_write_nothing(change, sentence, call, content, tmp_path, capsys):
    for key, value in change.items():
        content[key] = {**content["common"], **value} if key == "common" and value else value
    assert call() == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert sentence in lines[-1] and lines[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_comparison(tmp_path, capsys, monkeypatch):
    for text, sentence in (("a: [", "no valid YAML"), ("- 1", "must hold a map"), (None, "does not exist")):
        file = tmp_path / "file.yaml"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        assert console(["compare", str(file)]) == 2 and sentence in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert console(["compare", str(file)]) == 2 and "without torchrun" in capsys.readouterr().err


def test_rows_share_the_flags_and_the_schedule(content, tmp_path):
    content["common"] |= {"preset": "zoo", "lr_decay_epochs": [2], "triplet_margin": 0.7}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(content))
    comparison = read_comparison(file)
    alone, st = comparison.alone.only.config, comparison.methods["st"].only.config
    assert (
        alone.loss == ["cross_entropy:1,features=logits"] and alone.margin == 0.7 and alone.sample == st.triplet_sample
    )
    assert alone.lr_decay_at is st.lr_decay_at is None and alone.lr_decay_epochs == [2], (
        "what is given beats the preset"
    )
    different = {key for key in known_keys("train") if getattr(alone, key) != getattr(st, key, None)}
    assert different <= {"loss", "save_dir", "mode", "sample", "margin"}
    longer = comparison.control(20).only.config
    assert (longer.epochs, longer.lr_decay_epochs) == (20, [11]) and replace(
        longer, epochs=2, lr_decay_epochs=[2]
    ) == alone


def test_the_example_parses_and_has_every_method(tmp_path, monkeypatch, teacher):
    text = (ROOT / "examples" / "cifar_zoo.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo.yaml").write_text(re.sub(r"teacher_load: \S+", f"teacher_load: {teacher}", text))
    comparison = read_comparison(tmp_path / "zoo.yaml")
    assert len(comparison.methods) == 22 and comparison.alone.only.config.epochs == 200
    assert not list(tmp_path.glob("runs*"))
