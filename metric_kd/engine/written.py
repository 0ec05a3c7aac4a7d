"""What a program wrote in a folder: a manifest of names, so that nothing else is ever replaced or removed."""

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from metric_kd.engine.checkpoint import write_text
from metric_kd.errors import UserError
from metric_kd.plain import parse_json
from metric_kd.scratch import is_plain, sweep_beside

MANIFEST = ".metric_kd.json"
FORMAT = "metric_kd folder 1"


class Written:
    """The names of files that we wrote below ``folder``, relative and with slashes.

    They lie in ``folder/.metric_kd.json``, which has a name before its file is written. Links below the folder are never
    followed: a name that is one, or lies behind one, is refused. older: the names in a folder that has no manifest yet.
    """

    def __init__(self, folder: Path, older: Callable[[], Iterable[str]] = tuple):
        self.folder, self.manifest, self.older = folder, folder / MANIFEST, older
        self._names: set[str] | None = None

    @property
    def names(self) -> set[str]:
        """As they were when last read, or written."""
        if self._names is None:
            self.read()
        assert self._names is not None
        return self._names

    def read(self) -> None:
        """Read the manifest again; raises ``UserError`` where it is none of ours."""
        if not self.manifest.exists() and not self.manifest.is_symlink():
            self._names = set(self.older())
            return
        try:
            content = parse_json(self.manifest.read_text()) if is_plain(self.manifest) else {}
            names = content["written"] if content["format"] == FORMAT else None
            if not isinstance(names, list) or not all(map(_is_below, names)):
                raise ValueError
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.manifest} is not, or not any more, the list of files that a run wrote; give another folder, or "
                "move this file away."
            ) from error
        self._names = set(names)

    def check(self, names: Iterable[str]) -> None:
        """Raise ``UserError`` where one of these names is taken by something that we did not write, or by a link."""
        for name in names:
            path = self.folder / name
            self.check_folders(place.relative_to(self.folder).as_posix() for place in reversed(self._between(path)))
            _check_no_link(path)
            if path.exists() and not (name in self.names and is_plain(path)):
                raise UserError(f"{path} is there and was not written by a run; move it away, or give another folder.")

    def check_folders(self, names: Iterable[str]) -> None:
        """Raise ``UserError`` where files of ours could not lie in folders of these names."""
        for name in names:
            place = self.folder / name
            _check_no_link(place)
            if place.exists() and not place.is_dir():
                raise UserError(f"{place} is no folder; move it away, or give another folder.")

    def claim(self, path: Path) -> Path:
        """The path, once it is known as ours; to be called before the file is written."""
        name = path.relative_to(self.folder).as_posix()
        if name not in self.names:
            self.read()  # another command may have written since
            self.check([name])
            self.add([name])
        self.check([name])
        return path

    def add(self, names: Iterable[str]) -> None:
        """Put names of ours on the list."""
        self._store({*self.names, *names})

    def sweep(self) -> None:
        """Remove what killed processes left half-written of our names; for the one process that writes the folder."""
        for path in (self.manifest, *(self.folder / name for name in self.names)):
            if not any(place.is_symlink() for place in self._between(path)):
                sweep_beside(path)

    def remove(self, keep: Iterable[str] = ()) -> None:
        """Remove all that we wrote, and folders that are empty then; the manifest stays, with the names in ``keep``."""
        self.read()
        self.add(())  # a kill on the way must leave a list, also where there was none
        self.sweep()
        for name in sorted(self.names):
            self._unlink(self.folder / name)
        self._store(set(keep))

    def remove_some(self, names: Iterable[str]) -> None:
        """Remove those of these files that we wrote."""
        ours = self.names & set(names)
        for name in sorted(ours):
            self._unlink(self.folder / name)
        if ours:
            self._store(self.names - ours)

    def _unlink(self, path: Path) -> None:
        if any(place.is_symlink() for place in self._between(path)):
            return
        if is_plain(path):
            path.unlink(missing_ok=True)
        for place in self._between(path):
            with contextlib.suppress(OSError):  # not there, or not empty: others' files
                place.rmdir()

    def _between(self, path: Path) -> list[Path]:
        """The folders between ``folder`` and a file below it, the innermost first."""
        return [place for place in path.parents if self.folder in place.parents]

    def _store(self, names: set[str]) -> None:
        write_text(self.manifest, json.dumps({"format": FORMAT, "written": sorted(names)}, indent=1) + "\n")
        self._names = names


def _check_no_link(place: Path) -> None:
    if place.is_symlink():
        raise UserError(
            f"{place} is a link, and links in a run's folder are not followed; move it away, or give another folder."
        )


def _is_below(name: object) -> bool:
    """Whether this is the name of something below a folder, and of nothing outside."""
    if not isinstance(name, str) or "\0" in name or "\\" in name:
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/") and ":" not in parts[0]
