"""The page of a report: it stands alone, its figures are those of the evaluation, and it says what is not comparable."""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from metric_kd.errors import UserError
from metric_kd.evaluation.metrics import hits_at_k
from metric_kd.evaluation.search import find_neighbours
from metric_kd.evaluation.statistics import Interval, bootstrap, paired
from metric_kd.report.cost import Cost, Offer, flops_of, front, pareto, short
from metric_kd.report.embedding_map import CLASSES, EACH, embedding_map, pca, require, shown
from metric_kd.report.measured import Measured, Recipe, TestSet
from metric_kd.report.run_report import AGAINST_TEACHER, galleries_of, write_run_report
from metric_kd.report.run_words import summary
from metric_kd.report.runs import RunSummary
from metric_kd.report.term_curves import share_curves, term_curves
from metric_kd.types import Output

from .conftest import history
from .test_page import Page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = ("<zero>", "one & only", "two", "three")
LABELS = torch.arange(4).repeat_interleave(10)


def recipe(seed=0, family="f", epochs=4, fingerprint="a", selection="the result is the last epoch"):
    trained = "80 images of 8 classes"
    return Recipe(
        ("triplet:1", "rkd:2"), epochs, seed, trained, fingerprint, selection, family, {"lr": "0.1"}, {"torch": "2"}
    )


def network(title, noise, teacher=None, *, size=8, ms=1.0, made=None, records=None, base="resnet8"):
    """Embeddings of four classes, the noisier the worse."""
    draw = torch.Generator().manual_seed(1)
    vectors = torch.eye(4, size)[LABELS] + noise * torch.randn(40, size, generator=draw)
    found = find_neighbours(vectors, k=5, query_labels=LABELS)
    hits = {k: hits_at_k(found, k) for k in (1, 2)}
    scores = {f"Recall@{k}": bootstrap(values) for k, values in hits.items()}
    cost = Cost(1000 * size, 2_500_000, (ms, ms / 4), size)
    log = history(scores["Recall@1"].mean) if records is None else records
    run = RunSummary(
        title, "distilled" if teacher else "alone", cost.parameters, size, {1: scores["Recall@1"].mean}, 9.0, log
    )
    return Measured(run, base, cost, scores, teacher, made or recipe(), hits[1], found, vectors, LABELS)


def images(row):
    return np.full((16, 16, 3), 6 * row, np.uint8)


def a_test(networks, name="glyphs"):
    return TestSet(name, "40 of 4 classes, each a query against all others", 40, NAMES, networks, images, images)


@pytest.fixture
def tested():
    return a_test([network("big", 0.5, size=16, ms=4.0), network("small", 0.9, "big"), network("plain", 1.1)])


@pytest.fixture
def page(tmp_path, tested):
    def write(tests=(tested,), **changes):
        words = {"title": "Report <1>", "intro": "Three & more.", "notes": ["A note."], "facts": {"Timed on": "a CPU"}}
        path = write_run_report(tmp_path / "page.html", tests, **words | changes)
        return Tables(path.read_text(encoding="utf-8"))

    return write


class Tables(Page):
    """A page, and the words of its tables, row by row, cell by cell, a cell's parts joined by a bar."""

    def __init__(self, text):
        self.rows, self.cell = [], None
        super().__init__(text)

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True
        elif tag == "small":
            self.rows[-1][-1] += "|"

    def handle_endtag(self, tag):
        super().handle_endtag(tag)
        self.cell = None if tag in ("td", "th") else self.cell

    def handle_data(self, data):
        super().handle_data(data)
        if self.cell:
            self.rows[-1][-1] += data


def words(found):
    return " ".join(found.words.split())


def test_it_stands_alone_and_is_accessible(page):
    found = page()
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")
    assert found.all("html") == [{"lang": "en"}] and not found.all("script") and not found.all("link")
    for _, attributes in found.elements:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "href", "srcset", "style", "action", "poster"):
                assert "//" not in value or value.startswith("data:image/")
    assert "http" not in found.style and "url(" not in found.style and "@import" not in found.style
    assert "@media print" in found.style
    assert len(found.all("h1")) == 1 and all(len(image["alt"]) > 8 for image in found.all("img"))
    levels = [int(name[1]) for name, _ in found.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all("scope" in header for header in found.all("th")) and len(found.all("table")) == 3
    ids = [a["id"] for _, a in found.elements if "id" in a]
    named = [a[key] for _, a in found.elements for key in ("aria-labelledby", "aria-describedby") if key in a]
    assert len(ids) == len(set(ids)) and set(named) <= set(ids)


def test_the_figures_are_those_of_the_evaluation(page, tested):
    found = page()
    text = words(found)
    big, small, plain = tested.networks
    for each in (big, small, plain):
        for k in (1, 2):
            right = (LABELS[each.found.indices[:, :k]] == LABELS[:, None]).any(1).double()  # by hand
            value = bootstrap(right)
            assert each.scores[f"Recall@{k}"] == value
            row = next(row for row in found.rows if row[0].partition("|")[0] == each.title)
            assert row[k] == f"{100 * right.mean():.1f}|{100 * value.low:.1f} – {100 * value.high:.1f}"
    lost = int(((big.hits > 0) & (small.hits == 0)).sum())
    right = int(big.hits.sum())
    assert f"Of the {right} queries that the teacher gets right, it loses {lost} ({100 * lost / right:.1f}%)" in text
    gap = paired(small.hits, big.hits)
    assert f"{100 * abs(gap.difference.mean):.1f} points behind" in text
    assert "“plain”, the same network without a teacher" in text
    assert ["small", "8,000", "2.5 M", "1", "0.25", "8", "32"] in found.rows, "FLOPs, ms, numbers, MB per million"


def test_the_gallery_sorts_queries_by_teacher_and_student(tested):
    both, alone = galleries_of(tested, 2)
    big, small, plain = tested.networks
    theirs, ours = big.hits > 0, small.hits > 0
    expected = {
        "broken": int((theirs & ~ours).sum()),
        "fixed": int((~theirs & ours).sum()),
        "both_right": int((theirs & ours).sum()),
        "both_wrong": int((~theirs & ~ours).sum()),
    }
    assert {g.key: g.count for g in both.groups} == expected and [g.key for g in both.groups] == [
        k for k, _, _ in AGAINST_TEACHER
    ]
    assert both.compared == ("big", "small") and alone.compared is None
    assert all(len(group.rows) == min(2, group.count) for group in both.groups)
    for row in both.groups[0].rows:
        (_, first), (_, second) = row.found
        assert first[0].right and not second[0].right and len(first) == 5
    assert {g.key: g.count for g in alone.groups} == {
        "right": int(plain.hits.sum()),
        "wrong": int((plain.hits == 0).sum()),
    }


def test_right_and_wrong_are_told_by_more_than_colour(page):
    found = page()
    marks = [a["class"].split()[1] for a in found.all("li") if a.get("class", "").startswith("tile ")]
    legends = 2  # one for each gallery
    assert found.words.count("✓") == legends + marks.count("right") > legends
    assert found.words.count("✗") == legends + marks.count("wrong") > legends
    assert sum(a["alt"].endswith(", right") for a in found.all("img")) == marks.count("right")
    assert not [a for a in page(examples=0).all("li") if a.get("class", "").startswith("tile ")]


def test_seeds_are_merged_and_unequal_training_is_said(page):
    runs = [network(f"s{k}", 0.8 + 0.1 * k, made=recipe(seed=k)) for k in range(3)]
    text = words(page([a_test(runs)]))
    mean = sum(run.scores["Recall@1"].mean for run in runs) / 3
    assert f"over 3 seeds Recall@1 is {100 * mean:.1f}%" in text and "not trained" not in text
    other = [
        network("a", 0.5),
        network("b", 0.6, made=recipe(fingerprint="b", epochs=9, selection="epoch 3, selected on test")),
    ]
    text = words(page([a_test(other)]))
    assert (
        "not trained on the same images" in text
        and "(a 4, b 9)" in text
        and "b: the epoch was chosen by looking at the test" in text
    )
    assert "seeds Recall@1" not in text


def test_only_the_same_test_images_are_compared(page):
    text = words(page([a_test([network("a", 0.5)]), a_test([network("b", 0.5)], "birds")], maps="none"))
    assert "Recall on glyphs" in text and "Recall on birds" in text and "Against" not in text


def test_classifiers_have_accuracies_alone(page):
    made = network("c", 0.5)
    plain = Measured(made.summary, "r", made.cost, {"Top-1 accuracy": Interval(0.5, 0.4, 0.6)}, None, recipe())
    found = page([TestSet("cifar", "40 new images", 40, [], [plain])])
    text = words(found)
    assert "names the right class of 50.0% of 40 new images (95% interval 40.0 to 60.0%)" in text and "Accuracy" in text
    assert "Where the embeddings lie" not in text and not [a for a in found.all("li") if "tile" in a.get("class", "")]


def test_the_summary_does_not_praise_what_chance_gives(tested):
    big = tested.networks[0]
    twin = network("twin", 0.5, "big", size=16)
    text = " ".join(s.text for s in summary(a_test([big, twin])))
    assert "no difference in Recall@1" in text and "100% of the teacher's Recall@1 is kept" in text
    worse = network("worse", 3.0, "big", size=16)
    text = " ".join(s.text for s in summary(a_test([big, worse])))
    assert "behind in Recall@1" in text and "more than the choice of test images explains" in text


def test_terms_and_gradient_shares():
    log = [
        {
            "epoch": e,
            "loss": 3.0,
            "losses": {"a": 1 / e, "b": 2.0},
            "gradient_shares": {"a": 0.25 * e, "b": 1 - 0.25 * e},
        }
        for e in (1, 2)
    ]
    run = network("r", 0.5, records=log).summary
    assert "a from 1 to 0.5; b from 2 to 2" in term_curves(run).alt
    assert "a from 25% to 50%; b from 75% to 50%" in share_curves(run).alt
    single = network("r", 0.5).summary
    assert term_curves(single) is None and share_curves(single) is None


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, image, want):
        return Output(embedding=self.linear(self.norm(self.conv(image.float())).mean((2, 3))))


def test_flops_by_hand():
    network = Tiny().train()
    assert flops_of(network, 8) == 2 * (16 * 4 * 27 + 4 * 5)
    assert network.training and network.norm.num_batches_tracked == 0, "it is left as it was"


def test_pareto_front_by_brute_force():
    draw = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(a), float(b)) for a, b in draw.integers(0, 6, (8, 2))]

        def beaten(p, points=points):
            return any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)

        kept = front(points)
        assert sorted(kept) == [k for k, p in enumerate(points) if not beaten(p)]
        assert [points[k][0] for k in kept] == sorted(points[k][0] for k in kept)
    offers = [
        Offer("cheap", 1, Interval(0.5, 0.4, 0.6)),
        Offer("bad", 9, Interval(0.4, 0.3, 0.5)),
        Offer("best", 90, Interval(0.6, 0.5, 0.7)),
    ]
    picture = pareto(offers, "ms", "Recall@1")
    assert picture.alt.endswith("Not beaten in both: cheap, best.") and "bad 9 and 40.0%" in picture.alt
    assert [short(n) for n in (0.25, 999, 1_234_567, 2e9)] == ["0.25", "999", "1.23 M", "2 G"]


def test_pca_by_the_covariance():
    vectors = np.random.default_rng(0).normal(size=(60, 5)) * [5, 3, 1, 0.1, 0.1]
    places, share = pca(vectors)
    values = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    np.testing.assert_allclose(share, values[:2] / values.sum())
    np.testing.assert_allclose(np.cov(places.T), np.diag(values[:2]), atol=1e-9)
    assert pca(np.ones((4, 1)))[0].shape == (4, 2)


def test_a_map_shows_a_dozen_classes_and_the_same_images_for_all():
    labels = np.repeat(np.arange(30), 50)
    rows = shown(labels)
    assert len(set(labels[rows])) == CLASSES and (np.bincount(labels[rows])[labels[rows]] == EACH).all()
    assert (rows == shown(labels)).all() and {0, 29} <= set(labels[rows])
    assert len(set(labels[shown(np.repeat(np.arange(3), 2))])) <= 3
    picture = embedding_map("net", torch.randn(40, 6), LABELS, NAMES, "pca")
    assert "Map of the embeddings of net, 40 images of the classes <zero>, one & only, two, three. PCA" in picture.alt


def test_other_maps_or_one_sentence(monkeypatch, page):
    if importlib.util.find_spec("sklearn"):
        assert "t-SNE" in words(page(maps="tsne")) and "PCA" in words(page(maps="tsne"))
    monkeypatch.setattr("metric_kd.report.embedding_map.find_spec", lambda name: None)
    require("pca")
    for kind, package in (("tsne", "scikit-learn"), ("umap", "umap-learn")):
        with pytest.raises(UserError, match=f"pip install {package}"):
            page(maps=kind)


def test_it_is_replaced_whole(tmp_path, tested):
    path = tmp_path / "p.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_run_report(path, [tested], title="t", intro="i", maps="nonsense")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["p.html"]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_draws_it(page, tmp_path, width):
    page()
    shot = tmp_path / "shot.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},1600",
    ]
    subprocess.run(
        [BROWSER, *flags, f"--screenshot={shot}", f"file://{tmp_path / 'page.html'}"],
        capture_output=True,
        timeout=120,
        check=True,
    )
    picture = np.asarray(Image.open(shot).convert("L"))
    assert picture.shape == (1600, width)
    dark = (picture < 128).mean(1)
    assert 0.005 < dark.mean() < 0.5 and (dark.reshape(8, 200).max(1) > 0).all(), "text or pictures all the way down"


def test_more_than_the_teacher_is_not_kept(tested):
    better = a_test([network("big", 1.1, size=16), network("small", 0.5, "big")])
    text = " ".join(sentence.text for sentence in summary(better))
    assert "its teacher does so in" in text and "is kept" not in text
    assert "is kept" in " ".join(sentence.text for sentence in summary(tested))


def test_a_gallery_of_its_own_is_called_one(page, tested):
    assert "out of all other test images" in words(page([replace(tested, gallery_images=None)]))
    assert "nearest first, out of the gallery." in words(page([replace(tested, gallery_images=images)]))


@pytest.mark.filterwarnings("error")
def test_names_that_the_font_lacks_are_in_the_text():
    assert "\u9ce5" in embedding_map("net", torch.randn(40, 6), LABELS, ("\u9ce5", "b", "c", "d"), "pca").alt
