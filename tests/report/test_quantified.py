"""The page of metric-kd quantify: numbers, verdicts, maps and curves, in one file that needs no other."""

import base64
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from metric_kd.errors import UserError
from metric_kd.quantify.summary import Curve, EntropyMaps, Estimate, MetricRow, MetricTable
from metric_kd.report.entropy_maps import colour_range, tiles
from metric_kd.report.quantified import (
    QuantifiedReport,
    curves,
    gaps,
    lines,
    quantified_page,
    style,
    summary,
    table_text,
    verdict,
    write_quantified,
)

from .test_page import Page

NETWORKS = ("teacher", "distilled", "baseline")
HOSTILE = '"><script>alert(1)</script><img src=http://x.example/a.png onerror=b()> $x_1$ & {{ 7 * 7 }}'


def row(key, values, more=None, held=None, clear=None, title=""):
    made = {name: value for name, value in zip(NETWORKS, values, strict=True) if value != "left out"}
    return MetricRow(key, title or f"metric {key}", made, more, held, clear)


def metrics(scale=1.0):
    return [
        row(
            "n_fg", [Estimate(s * scale, e) for s, e in ((36.31, 1.92), (31.44, 1.7), (24.02, 1.84))], True, True, True
        ),
        row("n_bg", [Estimate(s * scale, 0.5) for s in (5.0, 6.25, 6.5)], False, True, False),
        row("ratio", [Estimate(0.88, 0.01), Estimate(0.83, 0.02), Estimate(0.79, 0.02)], True, False, True),
        row("d_mean", [None, Estimate(0.722, 0.04), Estimate(0.701, 0.03)], False, False, False),
        row("d_std", [None, Estimate(0.0312), Estimate(0.0415)], False, True, None),
        row("extra", [None, Estimate(0.5, 0.125), None]),
    ]


def maps(name="crow.jpg", side=24, grid=8, seed=0, networks=NETWORKS):
    draw = np.random.default_rng(seed)
    foreground = np.zeros((grid, grid), bool)
    foreground[2:6, 3:7] = True
    entropies = {network: draw.normal(-2.8, 0.3, (grid, grid)) - 0.4 * foreground for network in networks}
    return EntropyMaps(name, draw.integers(0, 256, (side, side, 3)).astype(np.uint8), foreground, entropies)


def curve(network, epochs, seed=0):
    draw = np.random.default_rng(seed)
    found, ground = draw.uniform(0, 30, len(epochs)), draw.uniform(1, 5, len(epochs))
    return Curve(network, np.array(epochs), found, ground, found / (found + ground))


@pytest.fixture
def report():
    return QuantifiedReport(
        "What distillation taught",
        "Three networks & two images.",
        NETWORKS,
        [MetricTable("images effective for both", 23, metrics()), MetricTable("all images", 50, metrics(0.5))],
        [curve("teacher", [30]), curve("distilled", [0, 10, 30], 1), curve("baseline", [0, 10, 30], 2)],
        [maps(), maps("wren.jpg", seed=1)],
        ["A concept lies 0.2 nats below."],
        {"Seed": "7", "Layer": "fc1"},
    )


def words_of(report):
    return " ".join(Page(quantified_page(report)).words.split())


def opened(source):
    kind, content = source.split(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    picture.load()
    assert picture.get_format_mimetype() == kind.removeprefix("data:")
    return picture


def test_the_page_stands_alone(report):
    text = quantified_page(report)
    found = Page(text)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")
    assert found.all("html") == [{"lang": "en"}] and not found.all("script") and not found.all("link")
    assert "http" not in text and "url(" not in found.style and "@import" not in found.style
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in found.elements:
        assert not any(key.startswith("on") or key in ("href", "srcset") for key in attributes)
        assert attributes.get("aria-labelledby", ids[0]) in ids
    regions = [a for _, a in found.elements if a.get("class") == "scroll"]
    assert len(regions) == 2 and all(a["tabindex"] == "0" and a["role"] == "region" for a in regions)
    assert "Three networks & two images." in found.words and "A concept lies 0.2 nats below." in found.words
    assert "Layer" in found.words and "fc1" in found.words


def test_every_picture_opens_and_says_numbers(report):
    found = Page(quantified_page(report)).all("img")
    assert len(found) == 1 + 2 * (1 + len(NETWORKS)) + 3  # colour bar; image and maps; N_fg, N_bg, lambda
    for image in found:
        assert len(image["alt"]) > 30 and any(letter.isdigit() for letter in image["alt"]), image["alt"]
        assert max(opened(image["src"]).size) <= 1100
    assert len(quantified_page(report)) < 500_000


def test_every_number_is_in_the_tables(report):
    """Three digits of the largest mean of a metric, in all tables alike; errors are never rounded to nothing."""
    text, terminal = words_of(report), " ".join(table_text(report).split())
    for mean, error in (
        ("36.3", "1.9"), ("31.4", "1.7"), ("24.0", "1.8"), ("18.2", "1.9"), ("12.0", "1.8"),
        ("5.00", "0.50"), ("6.25", "0.50"), ("6.50", "0.50"), ("3.12", "0.50"), ("2.50", "0.50"),
        ("0.880", "0.010"), ("0.830", "0.020"), ("0.722", "0.040"), ("0.500", "0.125"),
    ):  # fmt: skip
        assert f"{mean} ± {error}" in text, mean
        assert f"{mean} +- {error}" in terminal, mean
    for deviation in ("0.0312", "0.0415"):
        assert deviation in text and f"{deviation} ±" not in text and f"{deviation} +-" not in terminal
    for title in ("Images effective for both (23 images)", "All images (50 images)"):
        assert title in text and title in terminal
    assert "±" not in terminal and "+-" not in text


@pytest.mark.parametrize(
    ("values", "printed"),
    [
        ((0.0, 0.0), ("0", "0")),
        ((12345.6, 12.0), ("12346", "12")),
        ((12.3, 0.004), ("12.300", "0.004")),
        ((1.0, 1e-9), ("1.0000", "0.0000")),  # at most two decimals more
        ((2.5e-7, None), ("2.50e-07", "")),
        ((-0.25, math.nan), ("-0.250", "")),
        ((math.nan, None), ("-", "")),
    ],
)
def test_decimals(report, values, printed):
    table = MetricTable("one", 1, [row("x", [Estimate(*values), None, None])])
    (line,) = lines(replace(report, tables=[table]), table)
    assert line.values == [printed, ("-", ""), ("-", "")]


def test_a_symbol_stands_before_its_name(report):
    table = MetricTable("all", 2, [row("n", [Estimate(2.0)] * 3, True, title="Concepts, of all, N_x")])
    named = replace(report, tables=[table])
    assert "N_x Concepts, of all more in the distilled 2.00 2.00 2.00" in words_of(named)
    assert "Concepts, of all, N_x  2.00" in table_text(named)


@pytest.mark.parametrize(
    ("more", "held", "clear", "expected"),
    [
        (True, True, True, ("held", "held", "")),
        (False, False, True, ("failed", "did not hold", "")),
        (True, True, False, ("unclear", "held", "within its standard error")),
        (True, False, False, ("unclear", "did not hold", "within its standard error")),
        (False, True, None, ("unclear", "held", "no standard error")),
        (True, None, None, ("none", "-", "")),
        (None, None, None, ("none", "", "")),
    ],
)
def test_verdicts(more, held, clear, expected):
    assert verdict(row("x", [None] * 3, more, held, clear)) == expected


def test_the_page_says_what_held(report):
    text = words_of(report)
    for outcome in (
        "metric n_fg more in the distilled 36.3 ± 1.9 31.4 ± 1.7 24.0 ± 1.8 ✓ held metric",
        "metric n_bg less in the distilled 5.00 ± 0.50 6.25 ± 0.50 6.50 ± 0.50 ~ held within its standard error metric",
        "metric ratio more in the distilled 0.880 ± 0.010 0.830 ± 0.020 0.790 ± 0.020 ✗ did not hold metric",
        "metric d_mean less in the distilled - 0.722 ± 0.040 0.701 ± 0.030 ~ did not hold within its standard error m",
        "metric d_std less in the distilled - 0.0312 0.0415 ~ held no standard error metric",
        "metric extra - 0.500 ± 0.125 - All images",
    ):
        assert outcome in text, outcome
    assert "3 of 5 expectations held, 1 of them by more than the standard error." in summary(report)[0]
    assert all(sentence in text for sentence in (*summary(report), *gaps(report)))
    terminal = [" ".join(line.split()) for line in table_text(report).splitlines()]
    assert "metric ratio 0.880 +- 0.010 0.830 +- 0.020 0.790 +- 0.020 more in the distilled did not hold" in terminal
    assert "metric extra - 0.500 +- 0.125 -" in terminal


def test_what_is_not_known_is_explained_once(report):
    (sentence,) = gaps(report)
    assert "teacher: metric d_mean, metric d_std, metric extra; baseline: metric extra." in sentence
    assert sentence.count("d_std") == 1, "though it is missing in both tables"
    named = row("n", [None, Estimate(1.0), Estimate(1.0)], title="Concepts, of all, N_x")
    assert "not known. teacher: N_x. How" in gaps(replace(report, tables=[MetricTable("all", 2, [named])]))[0]
    full = [MetricTable("all", 2, metrics()[:3])]
    assert gaps(replace(report, tables=full)) == []


def test_a_missing_network_has_no_column(report):
    less = replace(
        report,
        networks=("teacher", "distilled"),
        tables=[MetricTable("all", 9, [row("n_fg", [Estimate(2.0), Estimate(1.0), "left out"], True)])],
        curves=report.curves[:2],
    )
    found = Page(quantified_page(less))
    headers = [a for a in found.all("th") if a["scope"] == "col"]
    assert len(headers) == 3 and len(found.all("img")) == 1 + 2 * 3 + 3
    assert summary(less) == ["All (9 images): nothing is compared; that takes a distilled network and a baseline."]
    assert "more in the distilled" in table_text(less) and "baseline" not in table_text(less).splitlines()[4]


def test_no_image_is_said_in_a_sentence(report):
    none = MetricTable("images effective for both", 0, [row(k.key, [None] * 3, k.more) for k in metrics()])
    empty = replace(report, tables=[none, report.tables[1]])
    said = "Images effective for both (0 images): there is none, so there are no numbers."
    assert said in words_of(empty) and said in table_text(empty)
    assert len(Page(quantified_page(empty)).all("table")) == 1 and len(gaps(empty)) == 1
    nothing = replace(report, tables=[none], pictures=[], curves=[curve("distilled", [])])
    assert not Page(quantified_page(nothing)).all("table") and "No image is shown." in words_of(nothing)
    assert not Page(quantified_page(nothing)).all("img") and "nan" not in words_of(nothing)
    unknown = Curve("distilled", np.array([0, 5]), *(np.full(2, np.nan) for _ in range(3)))
    assert curves(replace(report, curves=[unknown])) == []


def test_one_checkpoint(report):
    once = replace(report, curves=[curve(network, [30]) for network in NETWORKS])
    assert curves(once) == [] and "There are no curves over epochs here" in words_of(once)
    found, ground, ratio = curves(report)
    assert f"teacher {report.curves[0].foreground[0]:.3g}, one checkpoint" in found.alt
    assert f"baseline from {report.curves[2].background[0]:.3g} at epoch 0" in ground.alt
    assert "one checkpoint (teacher)" in ratio.caption
    one = report.curves[1]
    for shown, values in ((found, one.foreground), (ground, one.background), (ratio, one.ratio)):
        assert f"distilled from {values[0]:.3g} at epoch 0 to {values[-1]:.3g} at epoch 30" in shown.alt
        assert f"most {values.max():.3g} at epoch {one.epochs[values.argmax()]}" in shown.alt


def test_lines_differ_without_colour_and_without_style():
    """Of two networks, colour, dashes and marker all differ."""
    for names in (NETWORKS, ("a", "b", "c")):
        for of in zip(*(map(str, style(name, names)) for name in names), strict=True):
            assert len(set(of)) == 3


def test_colours_are_shared_by_all_maps(report):
    cells = np.concatenate([m.ravel() for shown in report.pictures for m in shown.maps.values()])
    assert colour_range(report.pictures, report.networks) == tuple(np.percentile(cells, (2, 98)).round(2))
    low, high = colour_range(report.pictures, report.networks)
    assert f"{low:.2f} to {high:.2f} nats" in words_of(report)
    flat = replace(maps(), maps={"teacher": np.full((8, 8), -3.0)})
    assert colour_range([flat], report.networks) == (-3.05, -2.95)
    assert colour_range([replace(flat, maps={})], report.networks) is None


def test_a_map_lies_over_its_image_at_the_right_place(report):
    """One cell of low entropy is dark violet, the others yellow, whatever the image; the object can still be seen."""
    image = np.full((32, 32, 3), 90, np.uint8)
    image[:, 16:] = 160
    values = np.full((4, 4), -2.0)
    values[3, 0] = -4.0
    shown = EntropyMaps("x", image, np.zeros((4, 4), bool), {"teacher": values})
    ((_, row),) = tiles([shown], ["teacher", "baseline"])
    painted = np.asarray(opened(row[1].picture.source).convert("RGB")).astype(int)
    assert painted.shape == (192, 192, 3)
    centres = painted[24::48, 24::48]
    assert centres[3, 0].argmax() == 2 and centres[3, 0].sum() < 300, "violet below left"
    yellow = np.delete(centres.reshape(-1, 3), 12, axis=0)
    assert (yellow[:, 2] < yellow[:, 1] - 40).all(), "the other cells"
    assert (centres[:3, 2:].sum(-1) > centres[:3, :2].sum(-1) + 60).all(), "the brighter half of the image"
    assert row[2].picture is None and row[2].name == "baseline"
    assert row[1].remarks == ("background -2.12 nats",) and "from -4.00 to -2.00 nats" in row[1].picture.alt


def test_the_foreground_is_outlined(report):
    """White inside and black outside its edge; nothing elsewhere, and nothing where all or no cells are foreground."""
    grey = np.full((224, 224, 3), 128, np.uint8)
    for cells, edges in ((slice(1, 3), True), (slice(0, 4), False), (slice(0, 0), False)):
        foreground = np.zeros((4, 4), bool)
        foreground[cells, cells] = True
        shown = EntropyMaps("x", grey, foreground, {})
        ((_, row),) = tiles([shown], report.networks)
        drawn = np.asarray(opened(row[0].picture.source).convert("L")).astype(int)
        assert drawn.shape == (192, 192) and abs(drawn[96, 96] - 128) < 8 and abs(drawn[10, 10] - 128) < 8
        assert (drawn[96, 48] > 220) == edges and (drawn[96, 47] < 60) == edges
        assert row[0].remarks == (f"foreground: {foreground.sum()} of 16 cells",)


@pytest.mark.parametrize(("height", "width"), [(500, 300), (227, 227), (100, 150), (17, 30), (1, 1)])
def test_images_of_any_size(report, height, width):
    image = np.zeros((height, width, 3), np.uint8)
    ((_, row),) = tiles([replace(maps(), image=image)], report.networks)
    sizes = {opened(tile.picture.source).size for tile in row}
    assert len(sizes) == 1 and max(max(sizes)) <= 192
    ((drawn_width, drawn_height),) = sizes
    assert drawn_width / drawn_height == pytest.approx(width / height, rel=0.02)


def test_text_is_escaped(report):
    values = {HOSTILE: Estimate(1.5, 0.25)}
    hostile = QuantifiedReport(
        HOSTILE,
        HOSTILE,
        [HOSTILE],
        [MetricTable(HOSTILE, 3, [MetricRow("x", HOSTILE, values, True, True, False), MetricRow("y", "y", {})])],
        [curve(HOSTILE, [0, 1])],
        [replace(maps(HOSTILE), maps={HOSTILE: np.zeros((8, 8))})],
        [HOSTILE],
        {HOSTILE: HOSTILE},
    )
    found = Page(quantified_page(hostile))
    assert not found.all("script") and HOSTILE in found.words and "49" not in found.words
    assert all(image["src"].startswith("data:image/") for image in found.all("img"))
    assert not any(key.startswith("on") for _, attributes in found.elements for key in attributes)
    assert HOSTILE in table_text(hostile)


def test_equal_input_gives_equal_bytes_and_the_file_is_replaced_whole(tmp_path, report):
    path = tmp_path / "new" / "page.html"
    assert write_quantified(path, report) == path
    first = path.read_bytes()
    assert write_quantified(str(path), report) == path and path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    with pytest.raises(ValueError, match="uint8"):
        write_quantified(path, replace(report, pictures=[replace(maps(), image=np.zeros((200, 200)))]))
    assert path.read_bytes() == first
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the page"):
        write_quantified(tmp_path / "file" / "p.html", report)


def test_refuses_a_page_of_nothing(report):
    for change in ({"networks": ()}, {"tables": []}):
        with pytest.raises(UserError, match="at least one network and one table"):
            replace(report, **change)
