"""The page stands alone: one file, no address, no script, every picture with words."""

import base64
import io
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from metric_kd.errors import UserError
from metric_kd.report.curves import training_curves
from metric_kd.report.gallery import retrieval_gallery
from metric_kd.report.page import RunSummary, write_page

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, text, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words, self.style = [], [], "", ""
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(tmp_path, runs, networks):
    def write(**changes):
        gallery = retrieval_gallery(
            networks,
            lambda row: np.full((16, 16, 3), 40 * row, np.uint8),
            ("<zero>", "one & only", "two"),
            compare=("Alone", "Distilled"),
            k=3,
        )
        content = {
            "title": "Distilling <glyphs>",
            "intro": "Three networks & one test.",
            "runs": runs,
            "galleries": [gallery],
            "facts": {"Seed": "7", "Paper": "https://arxiv.org/abs/1904.05068"},
            **changes,
        }
        path = write_page(tmp_path / "out" / "page.html", **content)
        return Page(path.read_text(encoding="utf-8"))

    return write


def test_stands_alone(page):
    found = page()
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")
    assert found.all("html") == [{"lang": "en"}] and not found.all("script") and not found.all("link")
    for _, attributes in found.elements:
        for key, value in attributes.items():
            if key in ("src", "href", "srcset", "style", "action", "poster"):
                assert "//" not in value or value.startswith("data:image/"), (key, value[:80])
            assert not key.startswith("on")
    assert "http" not in found.style and "url(" not in found.style and "@import" not in found.style


def test_every_picture_opens_and_has_words(page):
    found = page()
    assert len(found.all("img")) == 2 + 6 * (1 + 2 * 3)  # charts; queries with three neighbours in two networks
    for image in found.all("img"):
        assert len(image["alt"]) > 8
        kind, content = image["src"].split(";base64,")
        opened = Image.open(io.BytesIO(base64.b64decode(content)))
        opened.load()
        assert opened.get_format_mimetype() == kind.removeprefix("data:")


def test_ids_are_unique_and_references_hold(page):
    elements = page().elements
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a[key] for _, a in elements for key in ("aria-labelledby", "aria-describedby") if key in a]
    assert named and set(named) <= set(ids)


def test_numbers_and_words_are_in_it(page):
    words = " ".join(page().words.split())
    for expected in (
        "Distilling <glyphs>",
        "Three networks & one test.",
        "1/16 of the teacher's parameters",
        "closes 35% of the gap",
        "84.7%",
        "1,600,000",
        "1 min 32 s",
        "The hit rate",
        "Class-disjoint",
        "python run.py --epochs 3 --out <dir>",
        "https://arxiv.org/abs/1904.05068",
        "one & only",
        "2 of 6 queries (33.3%)",
    ):
        assert expected in words, expected
    assert words.count("86.5") == 1  # Recall@4 of the distilled student, in the table


def test_right_and_wrong_are_marked_without_colour(page, networks, labels):
    found = page()
    expected = [
        bool(labels[n.indices[q, j]] == labels[q]) for n in networks.values() for q in range(6) for j in range(3)
    ]
    marks = [a["class"].split()[1] for a in found.all("li") if a.get("class", "").startswith("tile ")]
    assert (marks.count("right"), marks.count("wrong")) == (expected.count(True), expected.count(False))
    assert found.words.count("✓") == 1 + expected.count(True) and found.words.count("✗") == 1 + expected.count(False)
    assert sum(a["alt"].endswith(", right") for a in found.all("img")) == expected.count(True)


def test_text_is_escaped(page, runs):
    found = page(title="<script>alert(1)</script>", runs=[replace(runs[0], title='"><img src=x>', note="<b>")])
    assert not found.all("script") and "<script>alert(1)</script>" in found.words
    assert all(image["src"].startswith("data:") for image in found.all("img"))
    assert "Remark" in found.words


def test_a_page_without_history_gallery_and_facts(page, runs):
    found = page(runs=[replace(run, history=[], command="") for run in runs], galleries=[], facts=None)
    assert not found.all("img") and "How they learned" not in found.words and "Student alone" in found.words


def test_only_common_ks_are_compared(page, runs):
    words = page(runs=[replace(runs[0], recall={1: 0.5, 2: 0.7}), replace(runs[1], recall={2: 0.6, 8: 0.9})]).words
    assert "one of its 2 nearest neighbours" in words and "90.0" not in words


def test_curves_say_what_they_show(runs):
    recalls, losses = training_curves(runs)
    assert "Big teacher ends at 84.7% after epoch 4" in recalls.alt
    assert "Student alone from 1 to 0.25" in losses.alt
    held_out = [{"epoch": 1, "loss": 0.5, "val_recall@1": 0.4}, {"epoch": 2, "loss": None}]
    (recall, loss) = training_curves([replace(runs[0], title="costs $5 and $6", history=held_out)])
    assert "40.0% after epoch 1" in recall.alt and "from 0.5 to 0.5" in loss.alt


def test_curves_leave_pyplot_alone(tmp_path):
    code = (
        "import sys; from metric_kd.report.page import RunSummary, write_page\n"
        "assert 'matplotlib' not in sys.modules and 'jinja2' not in sys.modules\n"
        "run = RunSummary('A', 'alone', 1, 1, {1: 0.5}, 1.0, [{'epoch': 1, 'loss': 1.0, 'recall@1': 0.5}])\n"
        "write_page(sys.argv[1], title='t', intro='i', runs=[run])\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_replaces_an_old_page_whole(tmp_path, runs):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(UndefinedError):
        write_page(path, title="t", intro="i", runs=runs, facts={"Seed": "1"}, galleries=[None])
    assert path.read_text() == "old"
    assert write_page(str(path), title="t", intro="i", runs=runs) == path
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_equal_input_gives_equal_bytes(tmp_path, runs):
    one, two = (write_page(tmp_path / name, title="t", intro="i", runs=runs).read_bytes() for name in "ab")
    assert one == two


def test_refuses_bad_input(tmp_path, runs):
    with pytest.raises(UserError, match="at least one run"):
        write_page(tmp_path / "p.html", title="t", intro="i", runs=[])
    with pytest.raises(UserError, match="a K of Recall@K that all runs"):
        write_page(tmp_path / "p.html", title="t", intro="i", runs=[runs[0], replace(runs[1], recall={3: 0.1})])
    with pytest.raises(UserError, match="fraction from 0 to 1"):
        RunSummary("A", "alone", 1, 1, {1: 84.7}, 1.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the page"):
        write_page(tmp_path / "file" / "p.html", title="t", intro="i", runs=runs)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
