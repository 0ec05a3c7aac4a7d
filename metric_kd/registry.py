"""Names for things: one registry per kind, filled by decorators where the things are defined."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from metric_kd.errors import UserError, one_of

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
        self._namespaces: dict[str, Callable[[str], T]] = {}

    def register(self, name: str, *aliases: str) -> Callable[[T], T]:
        def add(entry: T) -> T:
            for key in (name, *aliases):
                if self._resolver(key) is not None:
                    raise ValueError(f"{self.kind} {key!r} lies in a namespace; choose a name without its prefix.")
                if key in self:
                    raise ValueError(f"{self.kind} {key!r} is registered twice; choose another name.")
            self._entries[name] = entry
            self._aliases.update(dict.fromkeys(aliases, name))
            return entry

        return add

    def namespace(self, prefix: str, resolver: Callable[[str], T]) -> None:
        """Leave all names that begin with ``prefix`` (as in ``pml.``) to ``resolver``.

        It is given the rest of the name whenever one is asked for, never before, and returns the entry or raises
        ``UserError``. Iterating and counting leave its names out.
        """
        taken = [key for key in (*self._entries, *self._aliases) if key.startswith(prefix)]
        taken += [key for key in self._namespaces if key.startswith(prefix) or prefix.startswith(key)]
        if not prefix or taken:
            raise ValueError(f"{self.kind} namespace {prefix!r} overlaps with {taken}; choose another prefix.")
        self._namespaces[prefix] = resolver

    def canonical(self, name: str) -> str:
        """The registered name behind ``name`` (itself, or what it is an alias of)."""
        return self._find(name)[0]

    def __getitem__(self, name: str) -> T:
        return self._find(name)[1]

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and bool(self._find(name))
        except UserError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def aliases(self, name: str) -> list[str]:
        return sorted(alias for alias, target in self._aliases.items() if target == name)

    def _find(self, name: str) -> tuple[str, T]:
        resolve = self._resolver(name)
        if resolve is not None:
            return name, resolve()
        known = self._aliases.get(name, name)
        if known not in self._entries:
            raise one_of(self.kind, name, [*self._entries, *self._aliases])
        return known, self._entries[known]

    def _resolver(self, name: str) -> Callable[[], T] | None:
        for prefix, resolver in self._namespaces.items():
            if name.startswith(prefix):
                return lambda: resolver(name.removeprefix(prefix))
        return None
