"""What the examples and the README's table of names say works; the README's blocks are test_docs.py's."""

import functools
import re
import runpy
import subprocess
import sys

import pytest
import template
from documents import check_command, commands_of
from template import Forked
from tiny import ROOT

README = (ROOT / "README.md").read_text()
STARTS = ("python run", "metric-kd ")
KINDS = ("datasets", "samplers", "losses", "methods")


def test_the_first_example_is_short():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks and len([line for line in blocks[0].splitlines() if line.strip()]) <= 11


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.sh")))
def test_every_command_of_the_examples_parses(script):
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / "examples" / script).read_text())
    lines = [line.strip() for line in text.splitlines()]
    found = [words for line in lines if line.startswith(STARTS) for words in commands_of(line)]
    assert len(found) >= 2, "commands are not found any more"
    for words in found:
        check_command(words)


@functools.cache
def listed() -> dict[str, list[str]]:
    """What `metric-kd list KIND` prints, in a process where no other test has registered anything."""
    code = (
        f"from metric_kd.cli.main import main\nfor kind in {KINDS}: print('-' + kind, flush=True); main(['list', kind])"
    )
    text = template.completed(Forked(template.code, code, cwd=ROOT)).stdout
    found = {}
    for part in re.split(r"^-", text, flags=re.MULTILINE)[1:]:
        kind, *lines = part.splitlines()
        names = [line.split()[0] for line in (lines[1:] if kind == "methods" else lines)]
        found[kind] = [name for name in names if not name.startswith("pml.")]
    return found


@pytest.mark.parametrize(
    "kind, row",
    [("datasets", "data sets"), ("samplers", "triplet samplers"), ("losses", "losses"), ("methods", "distillation")],
)
def test_supported_names_are_real(kind, row):
    table = README.split("## What is there")[1].split("## One run")[0]
    line = "".join(text for text in table.splitlines() if text.startswith(f"| {row}"))
    names = listed()[kind]
    assert len(names) >= 4
    for name in names:
        assert name in line, f"the README's row {row!r} lacks {name}"


def test_methods_are_counted_right():
    count = int(re.search(r"(\d+) methods, each for both tasks", README)[1])
    assert count == len(listed()["methods"])


def test_no_bash_errors_in_examples():
    for script in (ROOT / "examples").glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def script(name: str, *flags: object) -> None:
    """Run an example in this process, where the glyphs have been drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, flags)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.mark.slow
def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script("distil_any_module.py")
    assert "step 200" in capsys.readouterr().out
    script("minimal_loop.py", "--steps", 2)
    assert "Recall@1" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_in_its_quick_form_writes_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script("demo.py", "--quick", "--out", tmp_path / "demo")
    page = capsys.readouterr().out.strip().splitlines()[-1]
    assert page == str((tmp_path / "demo" / "report.html").resolve())
    text = (tmp_path / "demo" / "report.html").read_text()
    assert "Recall@1" in text and "<img" in text and "http://" not in text


def test_help_of_the_scripts():
    """Each in an interpreter that has imported nothing before, as a user starts it."""
    for script in ("run.py", "run_distill.py"):
        done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "--lr_decay_epochs" in done.stdout
