"""--eval asymmetric, --bridge, and metric-kd eval --against."""

import json
import os
import re
import shutil

import pytest
import torch
from tiny import THREADS, TINY

from metric_kd.cli.asymmetric import refusals
from metric_kd.cli.distill import main as distill
from metric_kd.cli.embed import main as embed
from metric_kd.cli.evaluate import main as evaluate
from metric_kd.cli.evidence import main as evidence
from metric_kd.cli.pack import main as pack
from metric_kd.cli.parse import parse
from metric_kd.cli.reported import finished, further_metrics
from metric_kd.cli.train import main as train
from metric_kd.deploy.bridge import bridge_from
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.errors import UserError
from metric_kd.evaluation.compatibility import PAIRS

STUDENT = ["--base", "resnet8_x0.5:stem_stride=2", "--l2normalize", "false"]


def run(image_folder, teacher_run, save_dir, *flags):
    words = [*TINY, *STUDENT, "--data", image_folder, "--teacher_load", teacher_run, "--save_dir", save_dir, *flags]
    distill([str(word) for word in words])
    return save_dir


@pytest.fixture(scope="module")
def student_run(image_folder, teacher_run, tmp_path_factory):
    torch.set_num_threads(int(THREADS))
    flags = ["--embedding_size", 16, "--dist_ratio", 1, "--eval", "asymmetric", "--bridge", "ridge"]
    return run(image_folder, teacher_run, tmp_path_factory.mktemp("s") / "run", *flags)


def history(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_the_run_measures_what_the_matrix_says(student_run, teacher_run, capsys):
    """Two ways to one figure: during training, and afterwards without the bridge."""
    assert evaluate([str(student_run), "--against", str(teacher_run), "--bridge", "none"]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((student_run / "compatibility.json").read_text())
    last = history(student_run)[-1]
    assert list(stored["matrix"]) == list(PAIRS) and stored["verdict"] in printed
    assert stored["matrix"]["student-teacher"]["recall@1"] == last["asymmetric_recall@1"]
    assert stored["matrix"]["student-student"]["recall@1"] == last["recall@1"]
    assert "map@r" in stored["matrix"]["teacher-teacher"]


def test_the_stored_bridge_is_the_one_that_is_fitted_afterwards(student_run, teacher_run, capsys):
    bridge = bridge_from(read_checkpoint(student_run)["bridge"])
    assert bridge.kind == "ridge" and bridge.weight.shape == (16, 16)
    assert "a ridge bridge into the teacher's space" in (student_run / "result.txt").read_text()
    matrices = []
    for words in ([], ["--bridge=ridge"]):
        evaluate([str(student_run), "--against", str(teacher_run), *words])
        matrices.append(json.loads((student_run / "compatibility.json").read_text()))
    assert matrices[0]["matrix"] == matrices[1]["matrix"]
    assert matrices[0]["bridge"] == "ridge, stored with the student"
    assert matrices[1]["bridge"].startswith("ridge, fitted on ")


def test_other_widths_take_a_bridge(image_folder, teacher_run, tmp_path, capsys, monkeypatch):
    narrow = run(image_folder, teacher_run, tmp_path / "run", "--embedding_size", 8, "--dist_ratio", 1, "--epochs", 1)
    evaluate([str(narrow), "--against", str(teacher_run)])
    assert "bridge: ridge, fitted on" in capsys.readouterr().out
    monkeypatch.setattr("metric_kd.cli.against.embedded", lambda *_: pytest.fail("refused before anything is embedded"))
    with pytest.raises(UserError, match="fit a bridge"):
        evaluate([str(narrow), "--against", str(teacher_run), "--bridge", "none"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without torchrun"):
        evaluate([str(narrow), "--against", str(teacher_run)])


def test_a_teacher_without_a_description_is_what_the_run_says(student_run, image_folder, teacher_run, tmp_path, capsys):
    """A plain state dict of another base than the student's."""
    plain = tmp_path / "plain.pth"
    torch.save(read_checkpoint(teacher_run)["model"], plain)
    flags = ["--teacher_base", "resnet8:stem_stride=2", "--teacher_embedding_size", 16, "--embedding_size", 16]
    taught = run(image_folder, plain, tmp_path / "run", *flags, "--dist_ratio", 1, "--epochs", 1)
    for teacher in (plain, teacher_run):
        evaluate([str(taught), "--against", str(teacher)])
    first, second = re.findall(r"teacher-teacher .*", capsys.readouterr().out)
    assert first == second


def test_a_bridge_from_a_teacher_that_is_read(image_folder, teacher_run, tmp_path):
    """Fixed views in a cache: the first one is what the bridge is fitted on."""
    flags = ["--embedding_size", 16, "--loss", "regression:1", "--bridge", "procrustes", "--epochs", 1]
    cached = ["--views", 2, "--teacher_cache", tmp_path / "c.h5"]
    first = run(image_folder, teacher_run, tmp_path / "a", *flags, *cached)
    live = run(image_folder, teacher_run, tmp_path / "b", *flags, "--views", 2)
    ours, theirs = (bridge_from(read_checkpoint(path)["bridge"]) for path in (first, live))
    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-4, rtol=1e-3)


def test_losses_that_leave_the_student_on_its_own_are_noted(image_folder, teacher_run, tmp_path, capsys):
    flags = ["--embedding_size", 16, "--eval", "asymmetric", "--epochs", 1]
    run(image_folder, teacher_run, tmp_path / "a", *flags, "--dist_ratio", 1)
    assert "do not tie the student to the teacher's space" in "".join(capsys.readouterr())
    run(image_folder, teacher_run, tmp_path / "b", *flags, "--dist_ratio", 1, "--loss", "csd:1")
    assert "do not tie" not in "".join(capsys.readouterr())


def test_selection_is_by_what_the_run_is_for(image_folder, teacher_run, tmp_path):
    flags = ["--embedding_size", 16, "--eval", "asymmetric", "--loss", "csd:1", "--select", "val", "--epochs", 3]
    path = run(image_folder, teacher_run, tmp_path / "run", *flags)
    figures = [record["val_asymmetric_recall@1"] for record in history(path)]
    best = read_checkpoint(path)["metrics"]
    assert best["val_asymmetric_recall@1"] == max(figures)
    assert best["epoch"] == 1 + figures.index(max(figures))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--embedding_size", 8, "--eval", "asymmetric"], "give --embedding_size 16"),
        (["--eval", "asymmetric", "--unlabelled"], "leave one of the two out"),
    ],
)
def test_wrong_flags(image_folder, teacher_run, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run(image_folder, teacher_run, tmp_path / "run", "--dist_ratio", 1, *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bridge", "ridge", "--imitate", "embedding"], "leave --imitate out"),
        (["--eval", "asymmetric", "--mutual", "resnet18"], "leave --mutual out"),
        (["--eval", "asymmetric", "--task", "classification"], "leave --task classification out"),
    ],
)
def test_what_they_do_not_go_with(flags, words):
    (sentence,) = refusals(parse("distill", flags).config)
    assert words in sentence


def test_wrong_words_of_eval(student_run, teacher_run):
    for words, sentence in (
        (["--bridge", "ridge"], "name the teacher too"),
        (["--against"], "--against needs a value"),
        (["--against", "nowhere"], "nowhere does not exist"),
        (["--against", str(teacher_run), "--bridge", "cubic"], "unknown bridge 'cubic'"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate([str(student_run), *words])


def test_a_stored_bridge_leads_to_its_own_teacher_alone(student_run, image_folder, tmp_path, capsys):
    """Another teacher of that width is named; one of another width takes a bridge of its own."""
    flags = [*TINY, "--data", str(image_folder), "--epochs", "1", "--base", "resnet8:stem_stride=2"]
    for width, words in ((16, "stored with the student for "), (24, "bridge: ridge, fitted on")):
        other = tmp_path / str(width)
        train([*flags, "--embedding_size", str(width), "--save_dir", str(other)])
        capsys.readouterr()
        evaluate([str(student_run), "--against", str(other)])
        assert words in capsys.readouterr().out


def test_classifiers_have_no_matrix(image_folder, teacher_run, tmp_path):
    """A run says itself that it classifies; nobody has to give --task."""
    flags = [*TINY, "--task", "classification", "--data", str(image_folder), "--epochs", "1", "--embedding_size", "0"]
    train([*flags, "--save_dir", str(tmp_path / "c")])
    with pytest.raises(UserError, match="is a classifier; name a run of embeddings"):
        evaluate([str(tmp_path / "c"), "--against", str(teacher_run)])


def test_the_matrix_reads_a_pack_alone(image_folder, tmp_path):
    """Teacher of the same size, bridge fitted on training images: nothing needs the files once they are packed."""
    photos = shutil.copytree(image_folder, tmp_path / "photos")
    pack_file = tmp_path / "images.h5"
    pack(["--dataset", "folder", "--data", str(photos), "--input_size", "32", "--out", str(pack_file)])
    runs = [tmp_path / name for name in "ab"]
    for seed, run_dir in enumerate(runs):
        train([*TINY, "--data", str(photos), "--epochs", "1", "--seed", str(seed), "--save_dir", str(run_dir)])
    for path in photos.rglob("*.png"):
        when = path.stat().st_mtime_ns
        path.write_bytes(bytes(path.stat().st_size))  # no image, and as old and as long as it was
        os.utime(path, ns=(when, when))
    evaluate([str(runs[0]), "--against", str(runs[1]), "--bridge", "ridge", "--pack", str(pack_file)])
    assert "ridge, fitted on" in (runs[0] / "compatibility.json").read_text()


def test_another_width_is_refused_before_the_teacher_is_asked(image_folder, teacher_run, tmp_path, monkeypatch):
    monkeypatch.setattr("metric_kd.cli.session.targets_of", lambda *_: pytest.fail("the teacher was asked"))
    with pytest.raises(UserError, match="have 8 numbers and the teacher's 16"):
        run(image_folder, teacher_run, tmp_path / "run", "--dist_ratio", 1, "--eval", "asymmetric")


def test_a_file_of_embeddings_is_no_network_to_compare_with(student_run, tmp_path):
    (tmp_path / "teacher.npy").write_bytes(b"")
    words = [str(student_run), "--against", str(tmp_path / "teacher.npy")]
    for command in (evaluate, evidence):
        with pytest.raises(UserError, match="is a file of embeddings; name a network"):
            command(words)


def test_help_names_the_flags_of_the_matrix(capsys):
    with pytest.raises(SystemExit):
        evaluate(["--help"], "metric-kd eval")
    printed = capsys.readouterr().out
    assert "--against TEACHER" in printed and "--bridge BRIDGE" in printed and "--dataset" in printed


def test_a_report_says_in_words_what_was_measured_across(student_run):
    assert "Recall@1 in the teacher's gallery" in further_metrics(finished(str(student_run)))


def test_the_preset_is_the_recipe_of_its_losses():
    config = parse("distill", ["--preset", "compatible", "--teacher_load", "t"]).config
    assert [loss.split(":")[0] for loss in config.loss] == ["csd", "rkd_distance", "rkd_angle"]


def test_vectors_in_the_teachers_space(student_run, teacher_run, image_folder, tmp_path):
    import numpy as np

    import metric_kd

    images = sorted(str(path) for path in image_folder.rglob("*.png"))
    plain, bridged = (metric_kd.load(student_run, bridge=b).embed(images) for b in (False, True))
    bridge = bridge_from(read_checkpoint(student_run)["bridge"])
    np.testing.assert_allclose(bridged, bridge(torch.from_numpy(plain)).numpy(), rtol=1e-6)
    teacher = metric_kd.load(teacher_run).embed(images)
    gaps = [np.linalg.norm(vectors - teacher) for vectors in (plain, bridged)]
    assert gaps[1] < gaps[0]
    embed([str(student_run), "--images", str(image_folder), "--out", str(tmp_path / "x.npy"), "--bridge"])
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), bridged, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="holds no bridge"):
        metric_kd.load(teacher_run, bridge=True)
