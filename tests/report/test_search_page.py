"""The page of a search stands alone, shows what was found in order, and survives images that are gone."""

import numpy as np
import pytest
from PIL import Image

from metric_kd.errors import UserError
from metric_kd.report.search_page import Asked, Found, write_search_page

from .test_page import Page


@pytest.fixture
def page(tmp_path):
    paths = []
    for k, side in enumerate((40, 90, 300)):
        paths.append(tmp_path / f"im<{k}>_&.png")
        Image.fromarray(np.full((side, side, 3), 60 * k, np.uint8)).save(paths[-1])
    hits = tuple(Found(f"dir/{path.name}", str(path), 0.5 * k) for k, path in enumerate(paths))
    gone = Found("dir/gone.png", str(tmp_path / "gone.png"), 2.0)
    asked = [Asked("q<uery>_1.png", str(paths[0]), (*hits, gone)), Asked("none.png", str(paths[1]), ())]
    out = write_search_page(tmp_path / "out" / "page.html", asked, count=12345, facts={"Model": "a <model>"})
    return Page(out.read_text(encoding="utf-8").replace("<wbr>", ""))  # where a line may end


def test_it_stands_alone(page):
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert page.all("html") == [{"lang": "en"}] and not page.all("script") and not page.all("link")
    for _, attributes in page.elements:
        for key, value in attributes.items():
            if key in ("src", "href", "srcset", "style", "action", "poster"):
                assert "//" not in value or value.startswith("data:image/")
            assert not key.startswith("on")
    assert "http" not in page.style and "url(" not in page.style and "@import" not in page.style
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)) and {a["aria-labelledby"] for a in page.all("section")} <= set(ids)


def test_it_shows_what_was_found(page):
    alts = [image["alt"] for image in page.all("img")]
    found = [f"found: dir/im<{k}>_&.png" for k in range(3)]
    assert alts == ["query: q<uery>_1.png", *found, "query: none.png"], (
        "also the query itself, found, has words of its own"
    )
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    words = " ".join(page.words.split())
    for expected in (
        "12,345",
        "0.500",
        "1.000",
        "2.000",
        "dir/gone.png",
        "not there any more",
        "Nothing was found",
        "a <model>",
    ):
        assert expected in words, expected
    assert words.index("0.500") < words.index("1.000") < words.index("2.000")


def test_a_page_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the page"):
        write_search_page(tmp_path / "file" / "page.html", [Asked("a", "a", ())], count=1, facts={})
