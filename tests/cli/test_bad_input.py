"""Bad input: one sentence that says what to do, exit status 2, nothing written."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import TINY, command, write_images

from metric_kd.cli.distill import main as distill
from metric_kd.cli.main import main as metric_kd
from metric_kd.cli.main import run as run_command
from metric_kd.cli.train import main as train


def refusal(main, flags, capsys) -> str:
    """The one sentence of a refused command."""
    assert run_command(main, [str(f) for f in flags], "run.py") == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("error: ")
    return text


@pytest.fixture
def refused(tmp_path, image_folder, capsys):
    """Call with flags; gives the sentence, and checks that no run directory appeared."""

    def call(*flags, main=train, data=image_folder) -> str:
        run = tmp_path / "never"
        text = refusal(main, [*TINY, "--data", data, "--save_dir", run, *flags], capsys)
        assert not run.exists()
        return text

    return call


def test_missing_and_empty_data(refused, tmp_path):
    assert "nowhere" in refused(data=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(data=tmp_path / "empty")


def test_a_class_with_one_image(refused, tmp_path):
    data = write_images(tmp_path / "few", 4, 4)
    for file in sorted((data / "class00").iterdir())[1:]:
        file.unlink()
    assert "class00" in refused(data=data)


def test_unreadable_image_is_named_or_skipped(refused, tmp_path, capsys):
    data = write_images(tmp_path / "broken", 6, 6)
    (data / "class01" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert "03.png" in refused(data=data)
    assert train([*TINY, "--data", str(data), "--save_dir", str(tmp_path / "run"), "--skip_unreadable", "true"]) == 0
    assert "skipped 1 unreadable" in capsys.readouterr().out


def test_teachers(refused, tmp_path, teacher_run):
    assert "a teacher is needed" in refused("--dist_ratio", 1, main=distill)
    assert "does not exist" in refused("--dist_ratio", 1, "--teacher_load", tmp_path / "none.pth", main=distill)
    cut = tmp_path / "cut.pth"
    cut.write_bytes((teacher_run / "best.pth").read_bytes()[:5000])
    assert "cut.pth" in refused("--dist_ratio", 1, "--teacher_load", cut, main=distill)
    wrong = refused("--dist_ratio", 1, "--teacher_load", teacher_run, "--teacher_base", "resnet14", main=distill)
    assert "resnet8" in wrong and "resnet14" in wrong
    plain = tmp_path / "plain.pth"
    torch.save(torch.load(teacher_run / "best.pth", weights_only=True)["model"], plain)
    other = refused(
        "--dist_ratio",
        1,
        "--teacher_load",
        plain,
        "--teacher_base",
        "resnet14",
        "--teacher_embedding_size",
        16,
        main=distill,
    )
    assert "plain.pth" in other and "does not fit" in other


def test_four_wrong_bytes_in_the_weights_of_a_run(teacher_run, tmp_path, image_folder, capsys):
    run = tmp_path / "run"
    shutil.copytree(teacher_run, run)
    for name in ("best.pth", "last.pth"):
        content = bytearray((run / name).read_bytes())
        start = content.index(torch.load(run / name, weights_only=True)["model"]["linear.weight"].numpy().tobytes())
        content[start + 8 : start + 12] = bytes(4)
        (run / name).write_bytes(content)
    damaged = "best.pth is damaged: its contents do not match its digest; copy it again or train again."
    for command_line in (
        ["eval", run, "--device", "cpu"],
        ["export", run, "--to", "onnx", "--images", image_folder],
        ["embed", run, "--images", image_folder, "--out", tmp_path / "x.npy"],
        ["index", run, "--images", image_folder, "--out", tmp_path / "x.index"],
        [
            "distill",
            *TINY,
            "--data",
            image_folder,
            "--dist_ratio",
            1,
            "--teacher_load",
            run,
            "--save_dir",
            tmp_path / "s",
        ],
    ):
        assert metric_kd([str(word) for word in command_line]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].endswith(damaged)
    resumed = [*TINY, "--base", "resnet8:stem_stride=2", "--embedding_size", 16, "--data", image_folder, "--epochs", 3]
    assert "last.pth is damaged: its contents do not match" in refusal(train, [*resumed, "--save_dir", run], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_plain_state_dict_of_the_references_layout_is_a_teacher(teacher_run, tmp_path, image_folder):
    plain = tmp_path / "plain.pth"
    state = torch.load(teacher_run / "best.pth", weights_only=True)["model"]
    assert {key.split(".")[0] for key in state} == {"base", "linear"}
    torch.save(state, plain)
    flags = [*TINY, "--data", image_folder, "--save_dir", tmp_path / "run", "--dist_ratio", 1, "--teacher_load", plain]
    flags += ["--teacher_base", "resnet8:stem_stride=2", "--teacher_embedding_size", 16]
    assert distill([str(f) for f in flags]) == 0


def test_batches_and_recall(refused):
    assert "two classes" in refused("--batch", 3)
    assert "--recall" in refused("--recall", 0)
    assert "gallery" in refused("--recall", 1, 1000)


def test_metrics(refused, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert "did you mean 'map@r'" in refused("--metrics", "map", data=nowhere)
    assert "precision@0" in refused("--metrics", "nmi", "precision@0", data=nowhere)
    assert "--metrics" in refused("--metrics", "nmi", "--task", "classification", data=nowhere)
    assert "K = 1000 is larger than the gallery" in refused("--metrics", "precision@1000")


def test_relational_losses_need_a_teacher_and_vice_versa(refused):
    assert "run_distill.py" in refused("--loss", "rkd_angle:1")
    assert "weight zero" in refused("--loss", "l2_triplet:0")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_save_dir_without_permission(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "not writable" in refused("--save_dir", tmp_path / "locked" / "run")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that refuses root too")
def test_save_dir_that_nobody_may_write(refused):
    assert "not writable" in refused("--save_dir", "/proc/nowhere")


def test_an_image_that_breaks_while_training_leaves_nothing(tmp_path, capsys):
    """Larger images are decoded when they are met: the damage shows late, and the run has saved nothing yet."""
    from PIL import Image

    data = write_images(tmp_path / "large", 4, 4, size=128)
    for file in sorted(data.rglob("*.png")):
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    broken = data / "class00" / "01.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    flags = [*TINY, "--data", data, "--save_dir", tmp_path / "run", "--input_size", 96, "--batch", 8]
    assert "01.jpg" in refusal(train, flags, capsys)
    assert not (tmp_path / "run").exists()
    assert train([str(f) for f in [*flags, "--skip_unreadable", "--epochs", 1]]) == 0


def test_save_dir_is_a_file(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in refused("--save_dir", tmp_path / "file")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent(refused):
    assert "no CUDA device" in refused("--device", "cuda")


def test_names_get_suggestions(refused):
    assert "did you mean 'resnet" in refused("--base", "resnet2O")
    assert "did you mean 'folder'" in refused("--dataset", "foldr")
    assert "did you mean" in refused("--sample", "hrd")


@pytest.mark.parametrize("base", ["regnet_y_400mf", "convnext_tiny", "densenet121"])
def test_torchvision_names_pass_the_checks(base, tmp_path):
    """RegNets cannot be built without memory; the check must not need that."""
    from metric_kd.models import check_base

    assert check_base(base) == 224


def test_pretrained_true_where_there_is_none(refused):
    assert "resnet8" in refused("--pretrained", "true")


def test_commands(capsys):
    assert metric_kd(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert metric_kd([]) == 0
    for kind in ("datasets", "backbones", "samplers", "losses", "methods"):
        assert metric_kd(["list", kind]) == 0
    listed = capsys.readouterr().out.split()
    assert {"cub200", "glyphs", "resnet50", "distance", "l2_triplet", "rkd_angle", "wrn_16_2", "vit_b_16"} <= set(
        listed
    )
    assert metric_kd(["list", "loses"]) == 2


def test_a_script_prints_one_line_and_exits_with_2(tmp_path):
    done = command("run.py", "--dataset", "folder", "--data", tmp_path / "x", "--base", "resnet8", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0 and "Traceback" not in done.stderr
    assert not Path(tmp_path / "runs").exists()


def test_dry_run_measures_and_writes_nothing(tmp_path, image_folder, teacher_run, capfd):
    flags = [*TINY, "--data", str(image_folder), "--save_dir", str(tmp_path / "run"), "--dry_run", "true"]
    assert train(flags) == 0
    text = capfd.readouterr().out
    assert "one step" in text and "MiB" in text and not (tmp_path / "run").exists()
    assert distill([*flags, "--teacher_load", str(teacher_run), "--dist_ratio", "1"]) == 0
    assert run_command(distill, [*flags, "--dist_ratio", "1", "--teacher_load", "none"], "x") == 2


def test_disk_content_survives_refusals(tmp_path, image_folder, capsys):
    run = tmp_path / "run"
    train([*TINY, "--data", str(image_folder), "--save_dir", str(run)])
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    refusal(train, [*TINY, "--data", image_folder, "--save_dir", run, "--lr", "0.5"], capsys)
    assert before == {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    shutil.rmtree(run)


def test_cheap_refusals_come_before_the_data(refused, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert "run_distill.py" in refused("--loss", "rkd_angle:1", data=nowhere)
    assert "--num_image_per_class 2" in refused("--num_image_per_class", 1, data=nowhere)
    assert "--seed" in refused("--seed", -1, data=nowhere)
    (tmp_path / "file").touch()
    assert "is a file" in refused("--save_dir", tmp_path / "file", data=nowhere)
    assert "cannot embed images" in refused("--base", "googlenet", "--input_size", 16, "--pretrained", "false")


@pytest.mark.parametrize(
    "code, message",
    [("import nothing_of_that_name", "needs the module"), ("1 +", "SyntaxError"), ("raise ValueError('no')", "no")],
)
def test_plugins_that_fail_are_named(refused, tmp_path, code, message):
    plugin = tmp_path / f"p{abs(hash(code))}.py"
    plugin.write_text(code)
    text = refused("--plugins", plugin)
    assert plugin.name in text and message in text
    assert "does not exist" in refused("--plugins", tmp_path / "none.py")
    assert "no such module" in refused("--plugins", "nothing_of_that_name")


def test_a_loss_that_is_no_scalar(tmp_path, image_folder, capsys):
    plugin = tmp_path / "vector.py"
    plugin.write_text(
        "from metric_kd.losses.term import TERMS, Term\n"
        "@TERMS.register('vector')\n"
        "class Vector(Term):\n"
        "    def forward(self, student, teacher, batch):\n"
        "        return student.embedding.sum(1)\n"
    )
    flags = [*TINY, "--data", image_folder, "--save_dir", tmp_path / "run", "--plugins", plugin, "--loss", "vector:1"]
    assert "scalar" in refusal(train, flags, capsys)


def test_out_of_memory_names_a_batch_that_fits(monkeypatch, tmp_path, image_folder, capsys):
    from metric_kd.engine.tasks import Solo

    forward = Solo.forward

    def hungry(self, batch):
        if len(batch.labels) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch)

    monkeypatch.setattr(Solo, "forward", hungry)
    text = refusal(train, [*TINY, "--data", image_folder, "--save_dir", tmp_path / "run"], capsys)
    assert "--batch 6" in text


def test_embed_refuses_before_it_works(teacher_run, image_folder, tmp_path, capsys):
    def embed(*flags):
        assert metric_kd(["embed", str(teacher_run), *map(str, flags)]) == 2
        return capsys.readouterr().err

    assert "--batch" in embed("--images", image_folder, "--out", tmp_path / "a.npy", "--batch", 0)
    assert ".npy" in embed("--images", image_folder, "--out", tmp_path / "a.txt")
    assert "create it first" in embed("--images", image_folder, "--out", tmp_path / "no" / "a.npy")
    assert "images" in embed("--out", tmp_path / "a.npy")
    (tmp_path / "d.npy").mkdir()
    assert ".npy" in embed("--images", image_folder, "--out", tmp_path / "d.npy")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert "a.png" in embed("--images", broken, "--out", tmp_path / "a.npy")
    assert "none of the images" in embed("--images", broken, "--out", tmp_path / "a.npy", "--skip_unreadable")
    assert not list(tmp_path.glob("a.*"))
