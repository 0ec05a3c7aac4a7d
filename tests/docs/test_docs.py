"""What README.md and docs/ say works: their blocks are run, or checked where a mark says why not (see documents.py)."""

import importlib.util
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from documents import Block, as_command, blocks_of, check_command, commands_of, documents, in_small
from tiny import ROOT, TINY, write_images

BLOCKS = {path.relative_to(ROOT).as_posix(): blocks_of(path) for path in documents()}
RUN = {file: [b for b in blocks if b.mark in ("", "small") and b.language != "text"] for file, blocks in BLOCKS.items()}
FRESH = ("docs/tutorial.md",)
"""Pages that begin with nothing but photographs; the others find runs named teacher, student and alone as well."""

LONG = ("docs/tutorial.md", "docs/howto/choosing-losses.md", "docs/howto/own-data.md")


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    """What a page's --plugins register is gone after it; other tests list what there is."""
    from metric_kd.cli import plugins
    from metric_kd.data import DATASETS
    from metric_kd.losses.term import TERMS
    from metric_kd.models import BACKBONES

    before = [{*kind} for kind in (TERMS, DATASETS, BACKBONES)]
    loaded = {*plugins._LOADED}
    yield
    for kind, known in zip((TERMS, DATASETS, BACKBONES), before, strict=True):
        for name in {*kind} - known:
            del kind._entries[name]
    plugins._LOADED.intersection_update(loaded)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """photos/, new.jpg and tiny runs teacher, student and alone, made where they are used."""
    folder = tmp_path_factory.mktemp("prepared")
    _photos(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        common = [*TINY, "--data", "photos", "--save_dir"]
        run(["train", *common, "teacher", "--base", "resnet8:stem_stride=2", "--embedding_size", "16"])
        run(["train", *common, "alone"])
        run(["distill", *common, "student", "--teacher_load", "teacher", "--dist_ratio", "1", "--angle_ratio", "2"])
    return folder


def _photos(folder: Path) -> None:
    from PIL import Image

    write_images(folder / "photos", classes=8, per_class=8)
    Image.open(folder / "photos" / "class00" / "00.png").convert("RGB").save(folder / "new.jpg")


def run(words: list[str]) -> None:
    """One of our commands, in this process: another would spend most of its time on imports."""
    from metric_kd.cli.main import main

    assert main(words) == 0, " ".join(words)


def run_block(block: Block) -> None:
    if block.title:
        Path(block.title).write_text(block.text)
    elif block.language == "python":
        exec(compile(block.text, block.name, "exec"), {"__name__": "example"})
    else:
        for words in commands_of(block.text):
            own = as_command(words)
            assert own and words[0] in ("metric-kd", "python"), f"{block.name}: a test cannot run {words[0]}; mark it"
            run(in_small(own) if block.mark == "small" else own)


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=[pytest.mark.slow] if file in LONG else []) for file, blocks in RUN.items() if blocks],
)
def test_blocks_run_in_order(file, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if file in FRESH:
        _photos(tmp_path)
    else:
        shutil.copytree(request.getfixturevalue("prepared"), tmp_path, dirs_exist_ok=True)
    for block in RUN[file]:
        run_block(block)


@pytest.mark.parametrize("file", BLOCKS)
def test_commands_and_flags_exist(file):
    for block in BLOCKS[file]:
        if block.is_shell:
            assert commands_of(block.text), f"{block.name} holds no command"
            for words in commands_of(block.text):
                try:
                    check_command(words)
                except Exception as error:
                    raise AssertionError(f"{block.name}: {' '.join(words)}: {error}") from error
        elif block.language == "python":
            compile(block.text, block.name, "exec")
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        else:
            assert block.language == "text", f"{block.name}: what is a block of {block.language!r}?"
            assert not re.search(r"^(metric-kd|python|pip|make|torchrun) ", block.text, re.MULTILINE), block.name


def test_the_files_of_the_examples_compile():
    titled = [block for blocks in BLOCKS.values() for block in blocks if block.title.endswith(".py")]
    assert len(titled) >= 3
    for block in titled:
        compile(block.text, block.title, "exec")


def test_every_page_is_in_the_navigation_once():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r"([\w/-]+\.md)$", text.split("\nnav:")[1], re.MULTILINE)
    assert sorted(pages) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


class Addresses(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(given.get("href") or "")
        elif tag != "a":
            self.found.append(given.get("src") or "")


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings_handlers")),
    reason="needs the extra docs",
)
def test_the_site_builds_and_fetches_nothing_from_elsewhere(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = [path for path in (tmp_path / "site").rglob("*.html") if path.name != "404.html"]
    assert len(pages) == len(BLOCKS) - 1  # README.md stands in docs/readme.md
    for page in pages:
        addresses = Addresses()
        addresses.feed(page.read_text())
        assert not [a for a in addresses.found if re.match(r"(https?:)?//", a)], page
    text = (tmp_path / "site" / "api" / "functional.html").read_text()
    from metric_kd import functional

    for name in functional.__all__:
        assert f'id="metric_kd.functional.{name}"' in text, f"the page of losses lacks {name}"
    assert ":func:" not in text
    readme = (tmp_path / "site" / "readme.html").read_text()
    assert "Three commands" in readme and "Development" in readme


def test_marks_and_blocks_are_read_as_they_are_meant(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text\n    that goes on\n\n    metric-kd list \\\n        methods   # all\n\n    make x\n\n* entry\n\n    of it\n\n"
        "<!-- needs: a card -->\n\n```sh\nA=1 torchrun --n 2 run.py ... --lr 1\n```\n\n<!-- other -->\n\n"
        '<!-- small -->\n    metric-kd pack --dataset x   once: it\n\n```python title="a.py"\nx = 1\n```\n'
    )
    blocks = blocks_of(page)
    assert [(b.line, b.mark, b.language, b.title) for b in blocks] == [
        (4, "", "", ""), (15, "needs", "sh", ""), (22, "small", "", ""), (24, "", "python", "a.py"),
    ]  # fmt: skip
    assert commands_of(blocks[0].text) == [["metric-kd", "list", "methods"], ["make", "x"]]
    assert as_command(commands_of(blocks[1].text)[0]) == ["train", "...", "--lr", "1"]
    assert commands_of(blocks[2].text) == [["metric-kd", "pack", "--dataset", "x"]]
    page.write_text("<!-- skip: why -->\n\ntext\n")
    with pytest.raises(ValueError, match="no block"):
        blocks_of(page)


@pytest.mark.parametrize(
    "line",
    ["metric-kd fly", "metric-kd train --no_flag 1", "metric-kd index run --images x", "python none.py", "make none",
     "pip install '.[none]'", "metric-kd distill --loss nothing:1", "python benchmarks/run.py --none", "rm -r x",
     "metric-kd distill --dist_ratio 1 --relation_batch 24"],  # which is no multiple of the usual --batch
)  # fmt: skip
def test_what_does_not_exist_or_go_together_is_found(line):
    with pytest.raises((Exception, SystemExit)):
        check_command(commands_of(line)[0])
