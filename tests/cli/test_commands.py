"""The commands end to end on a tiny folder: train, evaluate, distil, embed."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import TINY

import metric_kd
from metric_kd.cli.distill import main as distill
from metric_kd.cli.main import main as console
from metric_kd.cli.train import main as train
from metric_kd.engine.checkpoint import read_checkpoint


def test_a_run_directory_holds_what_the_readme_says(teacher_run):
    assert {"config.yaml", "metrics.jsonl", "result.txt", "best.pth", "last.pth", "card.json"} <= {
        p.name for p in teacher_run.iterdir()
    }
    card = json.loads((teacher_run / "card.json").read_text())
    assert card["data"]["train"] == [32, 4] and card["data"]["test"] == [32, 4]
    assert card["environment"]["torch"] == torch.__version__
    result = (teacher_run / "result.txt").read_text()
    assert result.startswith("Best Recall@1: ") and "\nFinal Recall@1: " in result
    last = json.loads((teacher_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{100 * last['recall@1']:.4f}" in result


def test_more_metrics_stand_behind_recall(tmp_path, image_folder, capsys):
    run = tmp_path / "run"
    names = ["nmi", "map@r", "precision@3", "r_precision"]
    data = ["--dataset", "folder", "--data", str(image_folder)]
    assert train([*TINY, *data, "--epochs", "1", "--save_dir", str(run), "--metrics", *names]) == 0
    result = (run / "result.txt").read_text()
    assert result.startswith("Best Recall@1: ")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "recall@1" in line)
    assert all(0 <= last[name] <= 1 for name in names)
    capsys.readouterr()
    assert console(["eval", str(run), "--metrics", *names]) == 0
    printed = capsys.readouterr().out
    titles = {"nmi": "NMI", "map@r": "MAP@R", "precision@3": "Precision@3", "r_precision": "R-precision"}
    for name in names:
        line = f"{titles[name]}: {100 * last[name]:.4f}"
        assert line in printed and line in result


def test_evaluating_a_checkpoint_repeats_its_result(teacher_run, image_folder, capsys):
    assert (
        train(["--mode", "eval", "--dataset", "folder", "--data", str(image_folder), "--load", str(teacher_run)]) == 0
    )
    printed = capsys.readouterr().out
    assert printed.split("Recall@1: ")[1].split()[0] in (teacher_run / "result.txt").read_text()
    assert (
        console(
            [
                "eval",
                "--dataset",
                "folder",
                "--data",
                str(image_folder),
                "--load",
                str(teacher_run),
                "--recall",
                "1",
                "2",
            ]
        )
        == 0
    )
    assert "Recall@2" in capsys.readouterr().out
    assert console(["eval", str(teacher_run)]) == 0, "a run knows its own data"
    assert printed.split("Recall@1: ")[1].split()[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    "loss", ["rkd_distance:1", "rkd_angle:2", "dark_rank:1", "at:10", "fitnet:1", "l2_triplet:1,sample=hard"]
)
def test_every_method_distils(loss, teacher_run, image_folder, tmp_path):
    flags = [*TINY, "--data", str(image_folder), "--teacher_load", str(teacher_run), "--epochs", "1"]
    assert distill([*flags, "--loss", loss, "--save_dir", str(tmp_path / "run")]) == 0
    state = read_checkpoint(tmp_path / "run" / "last.pth")
    assert all(torch.isfinite(v).all() for v in state["model"].values())
    trained = any("fitnet" in key for key in state["task"])
    assert trained == loss.startswith("fitnet"), "a term's own parts are in last.pth"
    assert {key.split(".")[0] for key in read_checkpoint(tmp_path / "run")["model"]} == {"base", "linear"}


def test_fitnets_convolutions_are_trained(teacher_run, image_folder, tmp_path):
    flags = [*TINY, "--data", str(image_folder), "--teacher_load", str(teacher_run), "--loss", "fitnet:1"]

    def parts():
        state = read_checkpoint(tmp_path / "run" / "last.pth")["task"]
        return {key: value for key, value in state.items() if key.startswith("objective.")}

    distill([*flags, "--epochs", "1", "--save_dir", str(tmp_path / "run")])
    before = parts()
    distill([*flags, "--epochs", "2", "--save_dir", str(tmp_path / "run")])
    after = parts()
    assert before and all(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("select", ["val", "test"])
def test_selection_is_said(select, image_folder, tmp_path, capsys):
    train(
        [
            *TINY,
            "--data",
            str(image_folder),
            "--save_dir",
            str(tmp_path / "run"),
            "--select",
            select,
            "--train_classes",
            "6",
        ]
    )
    result = (tmp_path / "run" / "result.txt").read_text()
    card = json.loads((tmp_path / "run" / "card.json").read_text())
    assert all(("selected on test" in line) == (select == "test") for line in result.splitlines())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert console(["eval", str(tmp_path / "run")]) == 0
    assert ("selected on test" in capsys.readouterr().out.splitlines()[-1]) == (select == "test")
    assert all(("val_recall@1" in line) == (select == "val") for line in lines)
    if select == "val":
        assert card["data"]["train"][1] == 4, "a fifth of the training classes, and two at least, is held out"


def test_teacher_at_another_size(teacher_run, image_folder, tmp_path):
    flags = [
        *TINY,
        "--data",
        str(image_folder),
        "--teacher_load",
        str(teacher_run),
        "--dist_ratio",
        "1",
        "--at_ratio",
        "1",
    ]
    assert distill([*flags, "--input_size", "16", "--save_dir", str(tmp_path / "run")]) == 0
    assert read_checkpoint(tmp_path / "run")["network"]["input_size"] == 16


def test_a_start_gives_what_fits_and_prints_what_it_left(teacher_run, image_folder, tmp_path, capsys):
    base = ["--base", "resnet8:stem_stride=2", "--embedding_size", "4", "--epochs", "1"]
    train([*TINY, *base, "--data", str(image_folder), "--save_dir", str(tmp_path / "run"), "--load", str(teacher_run)])
    printed = capsys.readouterr().out
    assert "started from" in printed and "linear.weight" in printed


def test_cross_entropy_start_then_triplet(image_folder, tmp_path, capsys):
    train([*TINY, "--data", str(image_folder), "--save_dir", str(tmp_path / "ce"), "--loss", "softmax:1"])
    train([*TINY, "--data", str(image_folder), "--save_dir", str(tmp_path / "t"), "--load", str(tmp_path / "ce")])
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        "--precision bf16",
        "--precision fp16",
        "--optimizer sgd --schedule cosine --warmup 1",
        "--optimizer adamw --clip_norm 1 --freeze_bn true",
    ],
)
def test_training_options(flags, image_folder, tmp_path):
    assert train([*TINY, *flags.split(), "--data", str(image_folder), "--save_dir", str(tmp_path / "run")]) == 0


def test_embed_and_load(teacher_run, image_folder, tmp_path, capsys):
    out = tmp_path / "vectors.npy"
    assert console(["embed", str(teacher_run), "--images", str(image_folder), "--out", str(out)]) == 0
    vectors = np.load(out)
    names = [row["path"] for row in csv.DictReader(out.with_suffix(".csv").open())]
    assert vectors.shape == (64, 16) and len(names) == 64 and names == sorted(names)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    embedder = metric_kd.load(teacher_run)
    again = embedder.embed([image_folder / name for name in names[:5]], batch=2)
    assert np.allclose(again, vectors[:5], atol=1e-5)
    from PIL import Image

    arrays = [np.array(Image.open(image_folder / name)) for name in names[:5]]
    assert np.allclose(embedder.embed(arrays), again, atol=1e-6)
    assert np.allclose(embedder.embed(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)), again, atol=1e-6)
    assert np.allclose(embedder.embed(Image.open(image_folder / names[0])), again[:1], atol=1e-6)
    with pytest.raises(metric_kd.UserError, match=r"\(H, W, 3\)"):
        embedder.embed([np.zeros((4, 4, 2), np.uint8)])
    grey = arrays[0][:, :, 0]
    assert np.allclose(embedder.embed([grey]), embedder.embed([np.repeat(grey[:, :, None], 3, axis=2)]), atol=1e-6)
    assert console(["embed", str(teacher_run), "--images", str(tmp_path / "no"), "--out", str(out)]) == 2


def test_a_loss_from_outside_the_package_trains_through_the_command_line(image_folder, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from torch import Tensor\n"
        "from metric_kd.losses.term import TERMS, Term\n"
        "@TERMS.register('length_penalty')\n"
        "class LengthPenalty(Term):\n"
        "    def __init__(self, target: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.target = target\n"
        "    def forward(self, student, teacher, batch) -> Tensor:\n"
        "        return (student.embedding.norm(dim=1) - self.target).square().mean()\n"
    )
    flags = [
        *TINY,
        "--l2normalize",
        "false",
        "--data",
        str(image_folder),
        "--plugins",
        str(plugin),
        "--save_dir",
        str(tmp_path / "run"),
    ]
    assert train([*flags, "--loss", "l2_triplet:1", "--loss", "length_penalty:0.5,target=2"]) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert set(line["losses"]) == {"l2_triplet", "length_penalty"}


def test_a_reader_that_has_read_enough_is_no_error():
    code = "import sys; from metric_kd.cli.main import main; sys.exit(main(['list', 'methods']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1
