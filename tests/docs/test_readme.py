"""What the README and the examples say works."""

import re
import shlex
import subprocess
import sys

import pytest
from tiny import ROOT, command

from metric_kd.cli.losses import fold
from metric_kd.cli.parse import parse, run_as_flag

README = (ROOT / "README.md").read_text()


def commands_in(text: str) -> list[list[str]]:
    """Every `python run*.py` and `metric-kd` command of a text, as words; line continuations joined."""
    joined = text.replace("\\\n", " ").replace("$size", "64")
    lines = [line.strip().split(" #")[0] for line in joined.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(("python run", "metric-kd "))]


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks and len([line for line in blocks[0].splitlines() if line.strip()]) <= 11
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "file", ["README.md", *(f"examples/{p.name}" for p in sorted((ROOT / "examples").glob("*.sh")))]
)
def test_every_command_parses(file):
    found = commands_in((ROOT / file).read_text())
    assert len(found) >= 2, "commands are not found any more"
    for words in found:
        name, rest = (words[1], words[2:]) if words[0] == "python" else (words[1], words[2:])
        kind = {
            "run.py": "train",
            "run_distill.py": "distill",
            "train": "train",
            "eval": "train",
            "distill": "distill",
            "granularity": "granularity",
            "probe": "probe",
            "quantify": "quantify",
        }.get(name)
        rest = run_as_flag(rest) if kind == "probe" else rest
        if kind is not None:
            config = parse(kind, rest).config
            if kind != "quantify":  # which trains nothing, so that there is nothing to fold
                fold(config)


def listed(kind: str) -> list[str]:
    """What `metric-kd list KIND` prints, in a process where no other test has registered anything."""
    code = f"from metric_kd.cli.main import main; main(['list', '{kind}'])"
    lines = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    names = [line.split()[0] for line in (lines[1:] if kind == "methods" else lines)]
    return [name for name in names if not name.startswith("pml.")]


@pytest.mark.parametrize(
    "kind, row",
    [("datasets", "data sets"), ("samplers", "triplet samplers"), ("losses", "losses"), ("methods", "distillation")],
)
def test_supported_names_are_real(kind, row):
    table = README.split("## What is there")[1].split("## One run")[0]
    line = "".join(text for text in table.splitlines() if text.startswith(f"| {row}"))
    names = listed(kind)
    assert len(names) >= 4
    for name in names:
        assert name in line, f"the README's row {row!r} lacks {name}"


def test_no_bash_errors_in_examples():
    for script in (ROOT / "examples").glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_examples_run(tmp_path):
    done = command("examples/distil_any_module.py", cwd=tmp_path)
    assert done.returncode == 0 and "step 200" in done.stdout, done.stderr
    done = command("examples/minimal_loop.py", "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0 and "Recall@1" in done.stdout, done.stderr


def test_the_demo_in_its_quick_form_writes_a_page(tmp_path):
    done = command("examples/demo.py", "--quick", "--out", tmp_path / "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    page = done.stdout.strip().splitlines()[-1]
    assert page == str((tmp_path / "demo" / "report.html").resolve())
    text = (tmp_path / "demo" / "report.html").read_text()
    assert "Recall@1" in text and "<img" in text and "http://" not in text


def test_help_of_the_scripts():
    for script in ("run.py", "run_distill.py"):
        done = command(script, "--help")
        assert done.returncode == 0 and "--lr_decay_epochs" in done.stdout
