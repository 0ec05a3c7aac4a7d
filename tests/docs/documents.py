"""The code blocks of README.md and docs/, their marks, and the commands in them.

A block is fenced, or indented by four spaces after an empty line. An HTML comment before it is its mark:

    <!-- needs: WHAT -->   not run, because it wants data, devices or weights that a test has not
    <!-- skip: WHY -->     not run
    <!-- small -->         run, with SMALL added to its commands that train: fewer steps, smaller images, no download; and a
                           ResNet-8 where the command, or its preset, has a ResNet-18; packs are of small images too

A block without a mark is run as it stands. All are checked as they stand: commands, scripts and flags must exist, and flags
that say what a step is must go together. A fenced block with a title is a file that later blocks of the page use; one of
``text`` shows something and holds no command.
"""

import configparser
import importlib
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from tiny import ROOT

from metric_kd.cli import steps
from metric_kd.cli.evaluate import split_off
from metric_kd.cli.losses import fold
from metric_kd.cli.main import _MODULES, COMMANDS
from metric_kd.cli.parse import parse, read_words, run_as_flag

SMALL = (
    "--epochs 1 --iter_per_epoch 2 --batch 12 --num_image_per_class 3 --pretrained false --input_size 32 --device cpu"
).split()
SMALL_SIDE = "36"
"""What a pack holds for crops of 32 px."""
SMALL_BASE = "resnet8:stem_stride=2"
TRAINS = ("train", "distill")
SCRIPTS = {"run.py": "train", "run_distill.py": "distill"}
MARK = re.compile(r"<!-- (needs|skip|small)(?:: (.+?))? -->")
CONFIGURED = ("train", "eval", "distill", "granularity", "probe", "quantify")
"""Commands whose flags are those of ``metric_kd.cli.parse``."""


class Block(NamedTuple):
    """line: of the document, from 1; language: "" where the block is indented; mark: "", needs, skip or small."""

    file: str
    line: int
    language: str
    title: str
    text: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in ("", "sh", "bash")


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(path: Path) -> list[Block]:
    """The blocks of a document, in order. Raises ``ValueError`` for a mark that stands before no block."""
    lines = path.read_text().splitlines()
    file = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    found: list[Block] = []
    mark, at = "", 0
    while at < len(lines):
        line = lines[at]
        comment = MARK.fullmatch(line.strip())
        fence = re.fullmatch(r'```(\w*)(?: title="(.+)")?', line)
        if comment:
            _unused(mark, file, at)
            mark = comment[1]
        elif fence:
            end = lines.index("```", at + 1)
            found.append(Block(file, at + 1, fence[1], fence[2] or "", "\n".join(lines[at + 1 : end]) + "\n", mark))
            mark, at = "", end
        elif line.startswith("    ") and line.strip() and _begins(lines, at):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(row[4:] for row in lines[at:end]).strip("\n") + "\n"
            found.append(Block(file, at + 1, "", "", text, mark))
            mark, at = "", end - 1
        elif line.strip():
            _unused(mark, file, at)
        at += 1
    _unused(mark, file, at)
    return found


def _begins(lines: list[str], at: int) -> bool:
    """Whether an indented line begins a block of code: it goes on neither a paragraph nor a list's or definition's entry."""
    if at and lines[at - 1].strip() and not MARK.fullmatch(lines[at - 1].strip()):
        return False
    above = next((row for row in reversed(lines[:at]) if row.strip() and not row.startswith("    ")), "")
    return not re.match(r"\s*([*+-]|\d+\.|:) ", above)


def _unused(mark: str, file: str, at: int) -> None:
    if mark:
        raise ValueError(f"{file}:{at}: the mark {mark!r} stands before no block.")


def commands_of(text: str) -> list[list[str]]:
    """The command lines of a shell block as words, without comments and remarks set off by spaces."""
    joined = re.sub(r"\s*\\\n\s*", " ", text).replace("$size", "64")
    lines = [re.split(r"\s#|\s{2,}", line.strip())[0] for line in joined.splitlines()]
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


def inner(words: list[str]) -> list[str]:
    """A command without what starts it: VARIABLE=value, torchrun and its flags, python."""
    words = [*words]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words and words[0] == "torchrun":
        words = words[next(k for k, word in enumerate(words) if word.endswith(".py") or word == "metric-kd") :]
    elif words and words[0] in ("python", "python3"):
        words.pop(0)
    return words


def as_command(words: list[str]) -> list[str]:
    """``run.py --flag`` and ``metric-kd train --flag`` alike as ``train --flag``; of other programs nothing."""
    words = inner(words)
    if words and words[0] in SCRIPTS:
        return [SCRIPTS[words[0]], *words[1:]]
    return words[1:] if words and words[0] == "metric-kd" else []


def in_small(words: list[str]) -> list[str]:
    """A command of a block marked small as a test runs it; what does not train stays as it is."""
    if words[0] == "pack":
        return [*words, "--side", SMALL_SIDE]
    if words[0] not in TRAINS:
        return words
    words = [SMALL_BASE if word == "resnet18" else word for word in words]
    return [*words, *SMALL, *([] if "--base" in words else ["--base", SMALL_BASE])]


def check_command(words: list[str]) -> None:
    """Raise where a command, a script, a target of make, an extra or a flag does not exist; "..." stands for more flags;
    and where a command that trains, as it is written, would be refused for what makes up its step."""
    whole = "..." not in words
    words = [word for word in words if word != "..."]
    own = as_command(words)
    if own:
        return check_own(own[0], own[1:], whole)
    program, *rest = inner(words)
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make has no {rest[0]}"
    elif program in ("pip", "git"):
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        for extra in re.findall(r"\.\[(.+?)\]", " ".join(rest)):
            assert set(extra.split(",")) <= set(setup["options.extras_require"]), f"there is no extra {extra}"
    elif program == "bash" or program.endswith((".py", ".sh")):
        script = rest[0] if program == "bash" else program
        assert (ROOT / script).is_file(), f"{script} does not exist"
        known = "".join(path.read_text() for path in (ROOT / script).parent.glob("*.py"))
        for flag in (word for word in rest if word.startswith("--")):
            assert f'"{flag}"' in known, f"{script} has no flag {flag}"
    else:
        assert program in ("-m", "."), f"{program} is no command that a test knows"
    return None


def check_own(name: str, rest: list[str], whole: bool = True) -> Any:
    """Parse the flags of one of our commands as it would, without the checks that need files."""
    assert name in COMMANDS, f"metric-kd has no command {name}"
    if name == "list":
        return None
    if name not in CONFIGURED:
        module = importlib.import_module(f"metric_kd.cli.{_MODULES.get(name, name)}")
        return read_words(module._parser(None), rest)
    if name == "eval":
        _, rest = split_off(rest, ("against", "bridge"))
    config = parse({"eval": "train"}.get(name, name), run_as_flag(rest) if name in ("eval", "probe") else rest).config
    if whole and name != "quantify" and not config.plugins:  # which trains nothing, so that there is nothing to fold
        config = fold(config)
        refused = steps.refusals(config)
        assert not refused, " ".join(refused)
    return config
