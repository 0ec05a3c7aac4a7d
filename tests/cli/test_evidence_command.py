"""metric-kd evidence: of one run, of several seeds, and what it refuses."""

import json
import shutil

import pytest
from tiny import TINY, write_images

from metric_kd.cli.distill import main as distill
from metric_kd.cli.main import main as console
from metric_kd.cli.train import main as train
from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def students(image_folder, teacher_run, tmp_path_factory):
    runs = []
    for seed in (0, 1):
        run = tmp_path_factory.mktemp("students") / f"seed{seed}"
        flags = ["--data", image_folder, "--teacher_load", teacher_run, "--save_dir", run, "--seed", seed]
        distill([*TINY, *map(str, flags), "--dist_ratio", "1"])
        runs.append(run)
    return runs


def test_one_run_beside_its_teacher(students, teacher_run, capsys):
    assert console(["evidence", str(students[0])]) == 0
    said = capsys.readouterr().out
    report = json.loads((students[0] / "evidence.json").read_text())
    assert report["teacher"] == str(teacher_run) and report["images"] == 32 and report["k"] == 10
    for run, name in ((students[0], "student"), (teacher_run, "teacher")):
        final = (run / "result.txt").read_text().split("Final Recall@1: ")[1].split()[0]
        assert f"{100 * report['recall@1'][name]['mean']:.4f}" == final
    assert "merged" not in report and len(report["classes"]) == 4
    for words in ("Recall@1  student", "p = ", "hubness", "effective rank", "worst classes", "lost most", "linear CKA"):
        assert words in said


def test_seeds_are_merged(students, teacher_run, capsys):
    words = ["evidence", *map(str, students), "--against", str(teacher_run), "--k", "3", "--json"]
    assert console(words) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = [json.loads((run / "evidence.json").read_text()) for run in students]
    assert printed["reports"] == stored and stored[0]["k"] == 3
    recalls = [report["recall@1"]["student"]["mean"] for report in stored]
    together = stored[1]["merged"]
    assert together["recall@1"]["mean"] == pytest.approx(sum(recalls) / 2)
    assert together["runs"] == [str(run) for run in students] and together["notes"] == []
    assert console([*words[:-1]]) == 0
    assert "2 runs together" in capsys.readouterr().out


def test_two_runs_that_are_no_seeds_of_one_student(students, teacher_run, capsys):
    assert console(["evidence", str(students[0]), str(teacher_run), "--against", str(teacher_run)]) == 0
    said = capsys.readouterr().out
    assert "these runs differ in base, " in said and "same seed" in said


def test_runs_of_different_length_are_no_seeds(students, image_folder, teacher_run, tmp_path, capsys):
    run = tmp_path / "longer"
    flags = ["--data", image_folder, "--teacher_load", teacher_run, "--save_dir", run, "--seed", 2, "--epochs", 3]
    distill([*TINY, "--dist_ratio", "1", *map(str, flags)])
    assert console(["evidence", str(students[0]), str(run)]) == 0
    assert "these runs differ in epochs, so their spread" in capsys.readouterr().out


def test_what_it_refuses(students, teacher_run, tmp_path, capsys):
    def refused(*words):
        assert console(["evidence", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "is named twice" in refused(students[0], students[0])
    assert "without a teacher" in refused(teacher_run)
    assert "--k is 0" in refused(students[0], "--k", 0)
    assert "larger than the gallery" in refused(students[0], "--k", 40)
    assert "does not exist" in refused(students[0], "--against", tmp_path / "nothing")
    unlabelled = tmp_path / "unlabelled"
    words = ["--data", write_images(tmp_path / "plain", 2, 16), "--teacher_load", teacher_run, "--save_dir", unlabelled]
    distill([*TINY[2:], *map(str, words), "--unlabelled", "--dist_ratio", "1", "--epochs", "1"])
    assert "images without labels" in refused(unlabelled)
    other = tmp_path / "other"
    train([*TINY, "--data", str(write_images(tmp_path / "images", 6, 8)), "--save_dir", str(other), "--epochs", "1"])
    assert "other test images" in refused(students[0], other, "--against", teacher_run)


def test_the_network_that_has_no_finite_embeddings_is_named(students, teacher_run, tmp_path, capsys):
    broken = tmp_path / "broken.pth"
    content = read_checkpoint(students[1])
    content.pop("format")
    next(iter(content["model"].values())).fill_(float("nan"))
    write_checkpoint(broken, content)
    run = tmp_path / "run"
    shutil.copytree(students[1], run)
    shutil.copy(broken, run / "best.pth")
    (run / "evidence.json").unlink(missing_ok=True)
    against = ["--against", str(broken)]
    pages = ["report", str(students[0]), str(run), "--out", str(tmp_path / "page.html")]
    for words, named in (
        (["evidence", str(students[0]), str(run)], run),
        (["evidence", str(students[0]), *against], broken),
        (["eval", str(students[0]), *against], broken),
        (pages, "run"),
    ):
        capsys.readouterr()
        assert console(words) == 2
        assert f"{named}: its embeddings of 32 of 32 images are not finite" in capsys.readouterr().err
    assert not (run / "evidence.json").exists() and not (tmp_path / "page.html").exists()
