"""`metric-kd report` on tiny runs: its figures are those of eval, and what it cannot show it says."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from tiny import TINY, write_images

import metric_kd
from metric_kd.cli.distill import main as distill
from metric_kd.cli.main import main as console
from metric_kd.cli.reported import names_of
from metric_kd.cli.train import main as train
from metric_kd.data.folder import scan
from metric_kd.evaluation.metrics import recall

CLASSIFIER = [
    "--task", "classification", "--base", "resnet8_x0.5:stem_stride=2", "--batch", "12", "--iter_per_epoch", "2",
    "--dataset", "folder", "--epochs", "1", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(image_folder, teacher_run, tmp_path_factory):
    """A student with and without its teacher, two seeds of the one without."""
    folder = tmp_path_factory.mktemp("runs")
    data = [*TINY, "--data", str(image_folder)]
    for seed, name in enumerate(("alone", "again")):
        train([*data, "--seed", str(seed), "--save_dir", str(folder / name)])
    terms = ["--loss", "l2_triplet:1", "--loss", "rkd_distance:1", "--teacher_load", str(teacher_run)]
    distill([*data, *terms, "--save_dir", str(folder / "distilled")])
    return folder


@pytest.fixture(scope="module")
def classifier(image_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("classifier") / "names"
    flags = [
        "--task",
        "classification",
        "--base",
        "resnet8_x0.5:stem_stride=2",
        "--batch",
        "12",
        "--iter_per_epoch",
        "2",
    ]
    flags += ["--dataset", "folder", "--data", str(image_folder), "--epochs", "1", "--device", "cpu"]
    train([*flags, "--save_dir", str(run)])
    return run


def report(tmp_path, *words, status=0):
    out = tmp_path / "page.html"
    assert console(["report", *map(str, words), "--out", str(out), "--device", "cpu"]) == status
    return re.sub(r"<[^>]*>", "|", out.read_text().partition("</head>")[2])


def refusal(capsys, *words):
    capsys.readouterr()
    assert console(["report", *map(str, words)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


def test_figures_are_those_of_evaluation(runs, teacher_run, image_folder, tmp_path, capsys):
    text = report(tmp_path, runs / "distilled", runs / "alone", runs / "again", "--images", "1")
    assert "wrote" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["page.html"]
    records = scan(image_folder, "folder")
    test = np.isin(records.labels, np.arange(4, 8))
    for name, path in (("run", teacher_run), ("distilled", runs / "distilled"), ("alone", runs / "alone")):
        vectors = metric_kd.load(path).embed([p for p, held in zip(records.paths, test, strict=True) if held])
        value = recall(torch.from_numpy(vectors), torch.from_numpy(records.labels[test]), [1])[1]
        assert value == json.loads((path / "card.json").read_text())["metrics"]["best"]["recall@1"]
        assert re.search(rf"\|{name}\|[^0-9]*\|{100 * value:.1f}\|", text), (name, value)
    assert "with the teacher “run”" in text and "teacher: run" in text and "over 2 seeds Recall@1" in text
    assert "What “distilled” finds, beside its teacher “run”" in text and "What “alone” finds" in text
    assert "rkd_distance" in text and "What is left out" not in text
    parameters = sum(p.numel() for p in metric_kd.load(runs / "alone").network.parameters())
    assert f"|{parameters:,}|" in text


def test_a_teacher_that_is_given_is_there_once_and_one_that_is_gone_is_left_out(runs, teacher_run, tmp_path, capsys):
    text = report(tmp_path, runs / "distilled", teacher_run, "--images", "0", "--map", "none")
    assert text.count("What “") == 0 and len(re.findall(r"\|run\|\|", text)) == 2, "a row of Recall, a row of cost"
    shutil.copytree(runs / "distilled", tmp_path / "moved")
    config = tmp_path / "moved" / "config.yaml"
    config.write_text(config.read_text().replace(str(teacher_run), str(tmp_path / "gone")))
    capsys.readouterr()
    text = report(tmp_path, tmp_path / "moved", "--map", "none")
    assert f"The teacher of moved, {tmp_path / 'gone'}, is not there any more" in text and "is kept" not in text
    assert "is not there any more" in capsys.readouterr().out


def test_a_teacher_that_was_trained_again_is_noticed(runs, teacher_run, tmp_path):
    from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint

    content = read_checkpoint(teacher_run)
    content.pop("format")
    next(iter(content["model"].values())).view(-1)[0] += 0.1
    write_checkpoint(tmp_path / "teacher.pth", content)
    shutil.copytree(runs / "distilled", tmp_path / "moved")
    config = tmp_path / "moved" / "config.yaml"
    config.write_text(config.read_text().replace(str(teacher_run), str(tmp_path / "teacher.pth")))
    text = report(tmp_path, tmp_path / "moved", "--map", "none", "--images", "0")
    assert "teacher.pth is not the teacher that moved had" in text


def test_a_teacher_with_coders_is_the_one_that_it_was(image_folder, teacher_run, tmp_path):
    coders = [
        "granularity",
        "--teacher_load",
        teacher_run,
        "--save_dir",
        tmp_path / "coders",
        "--epochs",
        1,
        "--batch",
        12,
    ]
    assert console([*map(str, coders), "--device", "cpu"]) == 0
    flags = ["--granularity", "mag", "--granularity_load", tmp_path / "coders", "--dist_ratio", 1]
    distill(
        [
            str(word)
            for word in [
                *TINY,
                "--data",
                image_folder,
                "--teacher_load",
                teacher_run,
                *flags,
                "--save_dir",
                tmp_path / "s",
            ]
        ]
    )
    assert "trained again" not in report(tmp_path, tmp_path / "s", "--map", "none", "--images", "0")


def test_other_test_images_are_another_part(runs, tmp_path):
    images = write_images(tmp_path / "images", classes=6, per_class=6, seed=3)
    train([*TINY, "--data", str(images), "--save_dir", str(tmp_path / "other")])
    text = report(tmp_path, runs / "alone", tmp_path / "other", "--images", "0", "--map", "none")
    assert "so there are 2 parts: alone on images0 (folder); other on images (folder)" in text
    assert "Recall on images (folder)" in text and "Against" not in text


def test_a_classifier_says_what_is_left_out(classifier, runs, tmp_path, capsys):
    text = report(tmp_path, classifier, runs / "alone", "--images", "1")
    assert "names is a classifier: galleries" in text and "What “names”" not in text
    assert "Accuracy on images0 (folder), part 1" in text and "Recall on images0 (folder), part 2" in text
    value = top1(classifier)
    assert f"names the right class of {100 * value:.1f}% of" in text
    assert "names is a classifier" in capsys.readouterr().out


def test_the_teacher_of_a_classifier_is_asked_about_the_same_images(classifier, image_folder, tmp_path):
    flags = [*CLASSIFIER, "--data", str(image_folder), "--teacher_load", str(classifier), "--seed", "1"]
    distill([*flags, "--loss", "cross_entropy:1", "--loss", "st:1", "--save_dir", str(tmp_path / "pupil")])
    text = report(tmp_path, tmp_path / "pupil")
    for name, run in (("names", classifier), ("pupil", tmp_path / "pupil")):
        assert re.search(rf"\|{name}\|[^0-9]*\|{100 * top1(run):.1f}\|", text), name
    assert "teacher: names" in text and "its teacher does so in" in text


def top1(run):
    return json.loads((run / "card.json").read_text())["metrics"]["best"]["top1"]


def test_bad_input_is_one_sentence(runs, tmp_path, capsys):
    alone = runs / "alone"
    (tmp_path / "empty").mkdir()
    unfinished = tmp_path / "unfinished"
    shutil.copytree(alone, unfinished)
    (unfinished / "card.json").unlink()
    fitted = tmp_path / "imitated"
    shutil.copytree(alone, fitted)
    card = json.loads((fitted / "card.json").read_text())
    (fitted / "card.json").write_text(json.dumps({**card, "metrics": {"best": {"explained": 0.5}}}))
    for words, text in [
        ([tmp_path / "nothing"], "does not exist"),
        ([tmp_path / "empty"], "is no run of this program"),
        ([unfinished], "has not come to its end (2 of 2 epochs)"),
        ([fitted], "neither Recall nor accuracy"),
        ([alone, alone], "is named twice"),
        ([alone, "--images", "-1"], "--images is -1"),
        ([alone, "--map", "lda"], "lda"),
        ([alone, "--out", tmp_path / "no" / "p.html"], "does not exist; create it first"),
        ([alone, "--out", tmp_path], "ends in .html"),
        ([alone, "--out", "/proc/p.html"], "is not writable"),
        ([], "runs"),
    ]:
        assert text in refusal(capsys, *words), words
    assert not list(tmp_path.glob("*.html"))


def test_seeds_of_a_comparison_are_merged_although_each_has_its_own_start(image_folder, tmp_path):
    for seed in (0, 1):
        flags = ["--seed", seed, "--student_init", tmp_path / f"init{seed}.pth", "--save_dir", tmp_path / f"s{seed}"]
        train([*TINY, "--data", str(image_folder), *map(str, flags)])
    assert "Several seeds" in report(tmp_path, tmp_path / "s0", tmp_path / "s1")


def test_prefixes_and_other_data_sets_stand_beside(image_folder, tmp_path):
    other = write_images(tmp_path / "other", classes=6, per_class=6, seed=3)
    flags = ["--nested", "2,4", "--also_eval", f"folder:{other}", "--recall", "1", "2", "--save_dir", tmp_path / "s"]
    train([*TINY, "--data", str(image_folder), *map(str, flags)])
    text = report(tmp_path, tmp_path / "s", "--map", "none", "--images", "0")
    card = json.loads((tmp_path / "s" / "card.json").read_text())
    found, also = card["metrics"]["best"], card["also"][f"folder:{other}"]
    for name, value in [
        ("Recall@1 of the first 2 numbers (8 bytes)", found["recall@1[:2]"]),
        ("Recall@2 of the first 4 numbers (16 bytes)", found["recall@2[:4]"]),
        (f"Recall@2 on folder:{other}", also["recall@2"]),
    ]:
        assert f"|{name}||{100 * value:.1f}|" in text


def test_the_last_weights_of_a_run_may_teach_beside_its_best(image_folder, teacher_run, tmp_path):
    run = tmp_path / "student"
    flags = ["--teacher_load", teacher_run / "last.pth", "--dist_ratio", 1, "--save_dir", run]
    distill([*TINY, "--data", str(image_folder), *map(str, flags)])
    text = report(tmp_path, run, teacher_run)
    assert "last.pth" in text and "student" in text


def test_names_tell_runs_apart(tmp_path):
    assert names_of([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert names_of([tmp_path / "a" / "x", tmp_path / "b" / "y"]) == ["x", "y"]
