"""What is opened is data: no command, and no function, imports what a file that it reads names."""

import shutil
import sys

import pytest
import yaml
from tiny import TINY

import metric_kd
from metric_kd.cli.comparison import read_comparison
from metric_kd.cli.main import main
from metric_kd.cli.parse import parse
from metric_kd.errors import UserError


def command(*words):
    return main([*map(str, words)])


@pytest.fixture
def evil(tmp_path):
    """A plugin that leaves a mark where it is imported, as a run that somebody sent would have it."""
    plugin = tmp_path / "evil_plugin.py"
    plugin.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n")
    yield plugin
    sys.modules.pop("metric_kd_plugin_evil_plugin", None)


def with_plugins(run, place, plugins):
    """A copy of a run whose config names these plugins."""
    shutil.copytree(run, place)
    config = yaml.safe_load((place / "config.yaml").read_text())
    (place / "config.yaml").write_text(yaml.safe_dump({**config, "plugins": plugins}))
    return place


@pytest.fixture
def sent(teacher_run, tmp_path, evil):
    return with_plugins(teacher_run, tmp_path / "sent", [str(evil)])


REFUSING = {
    "export": lambda run, out, images: ["export", run, "--to", "onnx", "--out", out / "x.onnx", "--count", 2],
    "evidence": lambda run, out, images: ["evidence", run, "--against", run],
    "analyse": lambda run, out, images: ["analyse", run, "--against", run],
    "quantify": lambda run, out, images: ["quantify", "--distilled", run, "--out", out / "q", "--dry_run"],
    "train": lambda run, out, images: ["train", "--config", run / "config.yaml", "--save_dir", out / "again"],
    "eval --config": lambda run, out, images: ["eval", run, "--config", run / "config.yaml"],
}
OPENING = {
    "eval": lambda run, out, images: ["eval", run],
    "report": lambda run, out, images: ["report", run, "--out", out / "p.html", "--map", "none", "--images", 0],
    "embed": lambda run, out, images: ["embed", run, "--images", images, "--out", out / "x.npy"],
    "index": lambda run, out, images: ["index", run, "--images", images, "--out", out / "x.index"],
}


@pytest.mark.parametrize("name", [*REFUSING, *OPENING])
def test_no_command_imports_what_a_run_names(name, sent, evil, tmp_path, image_folder, capsys):
    status = command(*{**REFUSING, **OPENING}[name](sent, tmp_path, image_folder))
    said = capsys.readouterr().err
    assert not (tmp_path / "mark").exists()
    assert status == (2 if name in REFUSING else 0), said
    if name in REFUSING:
        assert f"--plugins {evil}" in said and "trust" in said
        assert not (tmp_path / "x.onnx").exists() and not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["evidence", "analyse", "quantify", "eval", "embed", "index"])
def test_every_command_imports_what_it_is_given(name, sent, evil, tmp_path, image_folder, capsys):
    from metric_kd.cli import plugins

    words = {**REFUSING, **OPENING}[name](sent, tmp_path, image_folder)
    assert command(*words, "--plugins", evil) == 0, capsys.readouterr().err
    assert (tmp_path / "mark").exists()
    plugins._LOADED.discard(str(evil.resolve()))


@pytest.mark.parametrize("name", ["report", "export", "search", "pack", "compare", "probe", "distill", "granularity"])
def test_every_command_has_the_flag(name, capsys):
    with pytest.raises(SystemExit):
        command(name, "--help")
    assert "--plugins" in capsys.readouterr().out


def test_a_network_that_is_not_known_is_put_down_to_the_plugin(sent, evil, tmp_path, image_folder, capsys):
    import torch

    for file in ("best.pth", "last.pth"):
        if (sent / file).exists():
            content = torch.load(sent / file, weights_only=True)
            content["network"]["base"] = "network_of_the_plugin"
            torch.save(content, sent / file)
    made = [OPENING[name](sent, tmp_path, image_folder) for name in OPENING]
    made.append(
        [
            "distill",
            *TINY,
            "--data",
            image_folder,
            "--teacher_load",
            sent,
            "--save_dir",
            tmp_path / "d",
            "--dist_ratio",
            1,
        ]
    )
    made.append(["probe", sent, "--dataset", "folder", "--data", image_folder, "--save_dir", tmp_path / "p"])
    for words in made:
        assert command(*words) == 2
        assert f"--plugins {evil}" in capsys.readouterr().err, words
    for opens in (sent, sent / "best.pth"):
        with pytest.raises(UserError, match="import it first"):
            metric_kd.load(opens)
    assert not (tmp_path / "mark").exists()


def test_whose_a_config_is(sent, evil, tmp_path, monkeypatch):
    """By its own path, by links to it and from it, below the run, as a copy beside the weights; not one of the user's own."""
    config = (sent / "config.yaml").read_text()
    own = tmp_path / "own.yaml"
    own.write_text(config)
    assert parse("train", ["--config", str(own)]).config.plugins == [str(evil)]
    (tmp_path / "link.yaml").symlink_to(sent / "config.yaml")
    (tmp_path / "folder").symlink_to(sent)
    (sent / "outside.yaml").symlink_to(own)
    (tmp_path / "round.yaml").symlink_to(sent / "outside.yaml")
    (sent / "config_resolved.yaml").write_text(config)
    (sent / "deep" / "er").mkdir(parents=True)
    (sent / "deep" / "er" / "x.yml").write_text(config)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.onnx").touch()
    (alone / "any.yaml").write_text(config)
    monkeypatch.chdir(sent)
    read = ["config.yaml", "../sent/config.yaml", tmp_path / "link.yaml", tmp_path / "folder" / "config.yaml"]
    read += ["outside.yaml", tmp_path / "round.yaml", "config_resolved.yaml", "deep/er/x.yml", alone / "any.yaml"]
    for path in read:
        with pytest.raises(UserError, match="--plugins"):
            parse("train", ["--config", str(path)])
        elsewhere = tmp_path / "mine" / evil.name  # the user's copy
        assert parse("train", ["--config", str(path), "--plugins", str(elsewhere)]).config.plugins == [str(elsewhere)]
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("key", ["metrics", "recall", "top", "lr_decay_epochs"])
@pytest.mark.parametrize("entry", ["--plugins=evil.py", "--load", "--", "-plugins"])
def test_a_value_of_a_list_is_no_flag(key, entry, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({key: [entry]}))
    with pytest.raises(UserError, match="looks like a flag"):
        parse("train", ["--config", str(file)])


@pytest.mark.parametrize("plugins", ["evil.py", {"a": 1}, [["a.py"]], [1], "os"])
def test_odd_spellings_of_plugins_in_a_run(plugins, teacher_run, tmp_path, capsys):
    run = with_plugins(teacher_run, tmp_path / "odd", plugins)
    assert command(*REFUSING["evidence"](run, tmp_path, None)) == 2
    assert "--plugins" in capsys.readouterr().err


def test_a_comparison_in_the_folder_of_a_run(sent, evil, tmp_path):
    content = {"save_dir": str(tmp_path / "c"), "seeds": [0]}
    content["common"] = {"dataset": "folder", "data": "x", "base": "resnet8", "teacher_load": str(sent)}
    content["common"]["plugins"] = [str(evil)]
    content["methods"] = {"rkd": ["rkd_distance:1"]}
    inside = sent / "compare.yaml"
    inside.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="--plugins"):
        read_comparison(inside)
    assert not (tmp_path / "mark").exists()
    own = tmp_path / "compare.yaml"
    own.write_text(yaml.safe_dump(content))
    assert read_comparison(own).alone.only.config.plugins == [str(evil)]


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{k}: &a{k} [{','.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 10)
)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", f"a: {'[' * 3000}", "epochs: 1\nepochs: 2", f"a: 0x{'f' * 5000}"])
def test_a_config_that_is_no_config_is_one_sentence(text, teacher_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(teacher_run, run)
    with (run / "config.yaml").open("a") as file:
        file.write(text)
    for words in (OPENING["report"](run, tmp_path, None), ["train", "--config", run / "config.yaml"]):
        assert command(*words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("error: ") and "config.yaml" in line and len(line) < 400


def test_a_card_that_is_nested_too_deeply_is_no_card(teacher_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(teacher_run, run)
    (run / "card.json").write_text("[" * 100_000)
    assert command(*OPENING["report"](run, tmp_path, None)) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_going_on_with_a_run_and_searching_an_index_import_nothing(image_folder, evil, tmp_path, capsys):
    """The command that goes on has its plugins on it; neither the folder nor the model of an index adds any."""
    words = ["train", *TINY, "--data", image_folder, "--epochs", 1, "--save_dir", tmp_path / "run"]
    assert command(*words) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert command("index", tmp_path / "run", "--images", image_folder, "--out", tmp_path / "x.index") == 0
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**config, "plugins": [str(evil)]}))
    image = next(image_folder.rglob("*.png"))
    found = metric_kd.Searcher(tmp_path / "x.index").search([image], 1)
    assert len(found[0]) == 1
    assert command("search", tmp_path / "x.index", "--query", image) == 0, capsys.readouterr().err
    assert command(*words, "--epochs", 2) == 0
    assert not (tmp_path / "mark").exists()
