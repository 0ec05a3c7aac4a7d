import pytest

from metric_kd.errors import UserError
from metric_kd.registry import Registry


def filled():
    things = Registry("thing")
    things.register("alpha", "first")("A")
    things.register("beta")("B")
    return things


def test_names_and_aliases():
    things = filled()
    assert things["alpha"] == things["first"] == "A" and things.canonical("first") == "alpha"
    assert list(things) == ["alpha", "beta"] and len(things) == 2 and things.aliases("alpha") == ["first"]
    assert "first" in things and "gamma" not in things and 3 not in things
    with pytest.raises(UserError, match="unknown thing 'alhpa'; did you mean 'alpha'"):
        things["alhpa"]
    for name in ("alpha", "first"):
        with pytest.raises(ValueError, match="registered twice"):
            things.register(name)("C")


def test_namespace_is_asked_only_when_needed_and_stays_out_of_the_list():
    things, asked = filled(), []

    def resolve(name):
        asked.append(name)
        if name == "bad":
            raise UserError("no such thing.")
        return name.upper()

    things.namespace("lib.", resolve)
    assert list(things) == ["alpha", "beta"] and len(things) == 2 and "alpha" in things and "lib" not in things
    assert not asked
    assert things["lib.one.two"] == "ONE.TWO" and things.canonical("lib.one") == "lib.one" and "lib.one" in things
    assert asked == ["one.two", "one", "one"]
    assert "lib.bad" not in things
    for read in (things.canonical, things.__getitem__):
        with pytest.raises(UserError, match="no such thing"):
            read("lib.bad")


def test_namespaces_and_names_do_not_overlap():
    things = filled()
    things.namespace("lib.", str.upper)
    with pytest.raises(ValueError, match="lies in a namespace"):
        things.register("lib.own")("C")
    with pytest.raises(ValueError, match="lies in a namespace"):
        things.register("own", "lib.own")("C")
    assert "own" not in things
    for prefix in ("lib.", "lib.inner.", "li", "al", "fir", ""):
        with pytest.raises(ValueError, match="overlaps"):
            things.namespace(prefix, str.lower)
