"""What all tests of the documents share."""

import functools

import pytest


@pytest.fixture(scope="session", autouse=True)
def glyphs_are_drawn_once():
    """Every command draws the same characters; a test has no time for that."""
    from metric_kd.data import glyphs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "_images", functools.cache(glyphs._images))
        yield
