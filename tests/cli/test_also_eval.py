"""--also_eval: Recall@K of the result on other data sets, after a run and in eval."""

import json

import pytest
import torch
from tiny import TINY, write_images

from metric_kd.cli.distill import main as distill
from metric_kd.cli.main import main as console
from metric_kd.cli.train import main as train
from metric_kd.data import load_dataset
from metric_kd.data.loading import ImageLoader
from metric_kd.data.transforms import Geometry
from metric_kd.engine.checkpoint import restore_network
from metric_kd.evaluation.embed import embed
from metric_kd.evaluation.metrics import recall


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("elsewhere") / "data", classes=6, per_class=4, seed=5)


def flags(data, run, *more):
    return [*TINY, "--data", str(data), "--save_dir", str(run), *map(str, more)]


def by_hand(run, data):
    network = restore_network(str(run), None, {})
    loader = ImageLoader(load_dataset("folder", str(data)).test, Geometry(network.spec.input_size, flip=False))
    vectors, labels, _ = embed(network, loader.test(8))
    gaps = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    first = float((labels[gaps.argmin(1)] == labels).double().mean())
    assert first == pytest.approx(recall(vectors, labels)[1])
    return first


@pytest.mark.parametrize("select", ["last", "val", "test"])
def test_the_result_on_other_images(image_folder, elsewhere, tmp_path, select, capsys):
    entry, run = f"folder:{elsewhere}", tmp_path / "run"
    more = ["--also_eval", entry, "--also_eval", "folder", "--nested", "2", "--metrics", "nmi", "--select", select]
    more += ["--lr", "0.3"] if select == "test" else []
    assert train(flags(image_folder, run, *more)) == 0
    card = json.loads((run / "card.json").read_text())
    assert card["also"] == {entry: {"recall@1": by_hand(run, elsewhere)}, "folder": card["also"]["folder"]}
    assert card["also"]["folder"]["recall@1"] == card["metrics"]["best"]["recall@1"]
    line = f"Recall@1 on {entry}: {100 * by_hand(run, elsewhere):.4f}"
    assert line in (run / "result.txt").read_text().splitlines()
    capsys.readouterr()
    assert console(["eval", str(run), "--also_eval", entry]) == 0
    assert line in capsys.readouterr().out


def test_it_changes_nothing_else(image_folder, elsewhere, teacher_run, tmp_path):
    from killing import same

    train(flags(image_folder, tmp_path / "with", "--also_eval", f"folder:{elsewhere}"))
    train(flags(image_folder, tmp_path / "without"))
    assert same(tmp_path / "with", tmp_path / "without")
    assert json.loads((tmp_path / "without" / "card.json").read_text())["also"] == {}


def test_a_student_without_labels_is_measured_elsewhere(elsewhere, teacher_run, tmp_path):
    data, run = write_images(tmp_path / "data", 4, 16), tmp_path / "run"
    words = flags(data, run, "--teacher_load", teacher_run, "--unlabelled", "--dist_ratio", 1)[2:]
    distill([*words, "--also_eval", f"folder:{elsewhere}"])
    card = json.loads((run / "card.json").read_text())
    assert list(card["also"].values()) == [{"recall@1": by_hand(run, elsewhere)}]


def test_refusals_come_before_training(image_folder, elsewhere, tmp_path, capsys):
    run = tmp_path / "run"
    for more, says in (
        (["--also_eval", "foldr"], "did you mean"),
        (["--also_eval", f"folder:{tmp_path / 'nothing'}"], "nothing"),
        (["--also_eval", f"folder:{tmp_path / 'nothing'}"], f"--also_eval folder:{tmp_path / 'nothing'}: the folder"),
        (["--also_eval", "folder", "--also_eval", "folder"], "twice"),
        (["--also_eval", f"folder:{elsewhere}", "--recall", "20"], "K = 20 is larger than the gallery"),
        (["--also_eval", "folder", "--task", "classification"], "--also_eval measures embeddings"),
    ):
        assert console(["train", *flags(image_folder, run, *more)]) == 2
        assert says in capsys.readouterr().err
    assert not run.exists()
