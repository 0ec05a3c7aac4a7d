"""A comparison's arithmetic against numpy, its table, its chart and its page."""

import io

import numpy as np
import pytest
from PIL import Image

from metric_kd.report.comparison import (
    ComparedRow,
    ComparisonReport,
    bar_chart,
    cells,
    chance,
    charts,
    comparison_page,
    spread,
    table_text,
)

from .test_page import Page

ALONE = {0: 0.60, 1: 0.62, 2: 0.61}
ST = {0: 0.63, 1: 0.64, 2: 0.65}
CONTROL = {0: 0.625, 1: 0.655, 2: 0.635}
AT = {0: 0.59, 1: 0.63, 2: 0.60}


def compared(**rows) -> ComparisonReport:
    """A report with these rows; a text stands for a failure."""
    made = [
        ComparedRow(name, {}, failure=values)
        if isinstance(values, str)
        else ComparedRow(name, values, seconds=90.0, weight="100" if name == "at" else "", losses=f"{name}:1")
        for name, values in rows.items()
    ]
    return ComparisonReport(
        "A comparison", "Top-1 accuracy", made, ["control: alone for 9 epochs."], {"Seeds": "0, 1, 2"}
    )


@pytest.fixture
def report():
    return compared(alone=ALONE, control=CONTROL, st=ST, at=AT, bss="loss 'bss' was not finite at step 7; <lower> it.")


def test_spread_is_numpys(report):
    for values in (ALONE, ST, AT):
        found = spread([*values.values()])
        assert found == (
            pytest.approx(np.mean([*values.values()])),
            pytest.approx(np.std([*values.values()], ddof=1)),
            3,
        )
    assert spread([0.5]) == (0.5, None, 1), "one seed has no deviation"
    with pytest.raises(ValueError):
        spread([])


def test_differences_are_paired(report):
    at, alone, st = report.row("at"), report.row("alone"), report.row("st")
    gaps = [AT[seed] - ALONE[seed] for seed in ALONE]
    assert at.against(alone) == (pytest.approx(np.mean(gaps)), pytest.approx(np.std(gaps, ddof=1)), 3)
    assert at.against(alone).within_noise and not st.against(alone).within_noise
    assert (
        st.against(st) is None and report.row("bss").against(alone) is None and alone.against(report.row("bss")) is None
    )
    assert not ComparedRow("a", {0: 0.5}).against(ComparedRow("b", {0: 0.5})).within_noise, "unknown with one seed"
    partly = ComparedRow("a", {1: 0.9, 7: 0.1}).against(alone)
    assert partly == (pytest.approx(0.28), None, 1), "only seeds that both have"


def test_how_often_chance_alone_leaves_the_noise():
    for seeds in (2, 3, 5):
        draws = np.random.default_rng(0).normal(size=(100_000, seeds))
        outside = np.abs(draws.mean(1)) > draws.std(1, ddof=1)
        assert chance(seeds) == pytest.approx(outside.mean(), abs=0.01)


def test_the_table_says_what_was_measured(report):
    text = table_text(report)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["st"].split() == "st 3 64.00 +- 1.00 +3.00 +- 1.00 +0.17 +- 1.53 ~ 1 min 30 s".split()
    assert "100 3 60.67 +- 2.08 -0.33 +- 1.15 ~" in " ".join(lines["at"].split())
    text = " ".join(text.split())
    assert "bss failed: loss 'bss' was not finite at step 7" in text and "9 epochs" in text
    assert "within noise" in text and "with 3 seeds, 23 % of methods without any effect" in text
    titles, rows = cells(report)
    assert titles == "row,weight,seeds,Top-1 accuracy,against alone,against st,against control,per run".split(",")
    assert [row[0].text for row in rows] == ["alone", "control", "st", "at", "bss"]


def test_one_seed_prints_no_deviation():
    report = compared(alone={4: 0.6}, st={4: 0.7})
    text = table_text(report)
    assert "+-" not in text and "~" not in text and "nan" not in text and "One seed" in text
    titles, _ = cells(report)
    assert "weight" not in titles and "against control" not in titles, "empty columns are left out"
    assert all("no spread" in picture.caption for picture in charts(report))


def test_the_chart_is_a_picture_with_all_rows(report):
    picture = Image.open(io.BytesIO(bar_chart(report)))
    assert picture.format == "PNG" and picture.width > picture.height > 300
    values, gains = charts(report)
    assert "st 64.00 +- 1.00; control 63.83" in values.alt and "bss" not in values.alt, (
        "best first, without failed ones"
    )
    assert "at -0.33 +- 1.15" in gains.alt and "alone +" not in gains.alt
    assert bar_chart(compared(alone="it failed"))
    assert charts(compared(alone="it failed")) == [] and len(charts(compared(alone="no", st=ST))) == 1


def test_the_page_stands_alone(report):
    text = comparison_page(report)
    page = Page(text)
    assert all(
        image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 30 for image in page.all("img")
    )
    assert len(page.all("img")) == 2 and not page.all("script") and not page.all("link") and "http" not in text
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    words = " ".join(page.words.split())
    assert "60.67 ± 2.08" in words and "within noise" in words and "+-" not in words
    assert "<lower>" in words, "failures are escaped"
    assert "alone for 9 epochs" in words and "at:1" in words
    assert Page(comparison_page(compared(alone={0: 0.5}, st="it failed"))).all("table")
