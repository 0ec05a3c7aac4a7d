"""YAML, JSON and HDF5 files read as plain values, within limits: what they say names no code and leads to no other file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

SIZE = 2**18
"""Characters of a YAML file, at most."""
DEPTH = 50
"""Lists and maps in each other, at most."""
VALUES = 20_000
"""Values of a YAML file, at most, each counted as often as it is repeated by an alias."""
DIGITS = 100
"""Characters of a number, at most."""


class TooMuch(yaml.YAMLError):
    """A YAML file beyond the limits, or one that says a key twice."""


class _Loader(yaml.SafeLoader):
    """Plain values only; counts while it reads, so that nothing large is ever made."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth, self.sizes = 0, dict[int, int]()

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEPTH:
            raise TooMuch(f"it is nested more than {DEPTH} deep")
        repeated = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if repeated and id(node) not in self.sizes:
            raise TooMuch("a part of it holds itself")
        if id(node) not in self.sizes:
            self.sizes[id(node)] = self._size(node)
        if len(self.sizes) > VALUES or self.sizes[id(node)] > VALUES:
            raise TooMuch(f"it holds more than {VALUES:,} values, or its aliases make as many of it")
        return node

    def _size(self, node: Any) -> int:
        """Values at and below a node."""
        if isinstance(node, yaml.ScalarNode):
            if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > DIGITS:
                raise TooMuch(f"a number in it has more than {DIGITS} digits")
            return 1
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            said = [key.value for key, _ in parts if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(set(said)) < len(said):
                raise TooMuch(f"it says {next(key for key in said if said.count(key) > 1)!r} twice")
            parts = [part for pair in parts for part in pair]
        return 1 + sum(self.sizes[id(part)] for part in parts)


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text. Raises ``yaml.YAMLError``, also for one that would fill the memory when it is written
    out (aliases of aliases), that holds itself, is nested too deeply, or says a key twice.
    """
    if len(text) > SIZE:
        raise TooMuch(f"it is longer than {SIZE:,} characters")
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except (RecursionError, ValueError, TypeError, OverflowError) as error:  # of a date or number that there is not
        raise yaml.YAMLError(str(error)) from None
    finally:
        if loader is not None:
            loader.dispose()


def parse_json(text: str | bytes) -> Any:
    """As ``json.loads``; one that is nested too deeply, or has a number of too many digits, is a ``JSONDecodeError`` too."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"no UTF-8: {error.reason}", "", 0) from None
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


@contextmanager
def opened_hdf5(path: "Path | str") -> Iterator[Any]:
    """An HDF5 file to read. Raises ``ValueError`` for links (soft or external), and for data that lie in other files.

    Without a lock: locks fail on many network file systems.
    """
    import h5py

    with h5py.File(path, "r", locking=False) as content:
        groups, seen = [content], set()
        while groups:
            group = groups.pop()
            for name in group:
                where = f"{group.name.rstrip('/')}/{name}"
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    raise ValueError(f"{where} is a link")
                item = group[name]
                if isinstance(item, h5py.Group):
                    place = h5py.h5o.get_info(item.id).addr
                    if place not in seen:  # hard links may lead in circles
                        seen.add(place)
                        groups.append(item)
                elif isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
                    raise ValueError(f"{where} lies in another file")
        yield content
