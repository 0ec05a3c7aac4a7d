"""Names for things: one registry per kind, filled by decorators where the things are defined."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from metric_kd.errors import one_of

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to things of one kind.

    ``kind`` is the word that error messages use, for example "loss". Registering a name twice is an error; asking for
    an unknown name raises :class:`~metric_kd.errors.UserError` with the nearest known name.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            for key in (name, *aliases):
                if key in self:
                    raise ValueError(f"{self.kind} {key!r} is registered twice; choose another name.")
            self._entries[name] = entry
            self._aliases.update(dict.fromkeys(aliases, name))
            return entry

        return add

    def canonical(self, name: str) -> str:
        """The registered name behind ``name`` (itself, or what it is an alias of)."""
        if name not in self:
            raise one_of(self.kind, name, [*self._entries, *self._aliases])
        return self._aliases.get(name, name)

    def __getitem__(self, name: str) -> T:
        return self._entries[self.canonical(name)]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def aliases(self, name: str) -> list[str]:
        return sorted(alias for alias, target in self._aliases.items() if target == name)
