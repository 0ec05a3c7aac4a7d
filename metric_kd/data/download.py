"""Fetch a file (mirrors, resume, checksum), unpack it (safe, whole or absent), and find what is already there."""

import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from metric_kd.durable import umask
from metric_kd.errors import UserError
from metric_kd.scratch import check_part, open_plain

BLOCK = 1 << 20
ATTEMPTS = 4
"""How often one mirror may break off without having sent anything new before the next one is asked."""


@dataclass(frozen=True)
class Source:
    """A published file: name, md5, mirrors, and the folder inside the archive that is wanted (empty: not an archive).

    page: where a person can read about it and get it by hand.
    """

    file: str
    md5: str
    urls: tuple[str, ...]
    inner: str
    page: str


class _WrongPart(OSError):
    """What lies in the .part file cannot be continued to the file that is wanted."""


def md5_of(path: Path) -> str:
    """The md5 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def fetch(
    urls: "tuple[str, ...] | list[str]",
    target: "str | Path",
    md5: str,
    *,
    page: str | None = None,
    timeout: float = 30.0,
    progress: bool = True,
) -> Path:
    """Download ``target`` from the first mirror that gives a file with this md5.

    A transfer that was cut goes on from ``<target>.part`` (HTTP Range), also in a later call; a server that ignores
    Range is read from the start. The file gets its name only after its checksum was right. Raises ``UserError``, with
    the place to put the file, where no mirror serves.
    """
    target = Path(target)
    reasons = []
    for url in urls:
        try:
            _fetch_one(url, target, md5, timeout, progress)
            return target
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{_host(url)}: {getattr(error, 'reason', None) or error or type(error).__name__}")
    raise UserError(
        f"cannot download {target.name} ({'; '.join(reasons)}); get it from {page or urls[0]} and "
        f"put this file here: {target}"
    )


def _host(url: str) -> str:
    return url.split("/")[2] if url.count("/") >= 2 else url


def _fetch_one(url: str, target: Path, md5: str, timeout: float, progress: bool) -> None:
    """One mirror: transfers as long as each brings something new, and one fresh start where the part is bad."""
    part = target.with_name(target.name + ".part")
    check_part(part, lambda path: True, "download")  # a link, a folder or a pipe is none
    idle, fresh = 0, False
    while idle < ATTEMPTS:
        before = part.stat().st_size if part.exists() else 0
        fresh = fresh or before == 0
        try:
            if _transfer(url, part, before, timeout, progress):
                found = md5_of(part)
                if found == md5:
                    os.replace(part, target)
                    return
                raise _WrongPart(f"its md5 is {found}, not {md5}")
        except _WrongPart:
            part.unlink()
            if fresh:
                raise
            continue  # what an earlier call left may be of another file: once more from the start
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException):
            if idle + 1 == ATTEMPTS or not part.exists():
                raise
        gained = part.exists() and part.stat().st_size > before
        idle = 0 if gained else idle + 1
    raise OSError("the connection breaks off")


def _transfer(url: str, part: Path, start: int, timeout: float, progress: bool) -> bool:
    """Append to ``part`` from byte ``start`` on; true where the server sent all that it announced."""
    request = urllib.request.Request(url, headers={"User-Agent": "metric_kd"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the range begins at or behind the end: complete already, or not this file
            whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]
            if whole == str(start):
                return True
            raise _WrongPart(str(error)) from error
        raise
    with response:
        if getattr(response, "status", None) == 206:
            if not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
                raise _WrongPart("the server sent another range")
        else:
            start = 0
        announced = response.headers.get("Content-Length")
        total = start + int(announced) if announced else None
        part.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(part, "ab", opener=open_plain) as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=not progress) as bar,
        ):
            file.truncate(start)
            file.seek(start)
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
            return total is None or file.tell() == total


def extract(archive: "str | Path", folder: "str | Path", inner: str | None = None) -> Path:
    """Unpack a tar or zip archive as ``folder``, which is whole afterwards or absent.

    ``inner`` names the folder inside the archive that becomes ``folder``; without it everything does. Absolute names,
    names that leave the folder, links and special files are refused with ``UserError``, as are broken archives.
    """
    archive, folder = Path(archive), Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if zipfile.is_zipfile(archive):
            _unzip(archive, scratch)
        else:
            _untar(archive, scratch)
        source = scratch / inner if inner else scratch
        if not source.is_dir():
            raise UserError(f"{archive} holds no folder {inner!r}; it is another archive, so get the right one.")
        if source == scratch:
            os.chmod(scratch, 0o777 & ~umask())  # mkdtemp makes it private
        os.rename(source, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); delete it and get it again.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _check_name(archive: Path, name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
        raise UserError(f"{archive} holds the name {name!r}, which leaves the folder; do not trust this archive.")


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for entry in tqdm(file.infolist(), desc=f"unpack {archive.name}", unit="file", leave=False):
            _check_name(archive, entry.filename)
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{archive} holds a link, {entry.filename!r}; do not trust this archive.")
            file.extract(entry, folder)


def _untar(archive: Path, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python cannot unpack tar archives safely; use Python 3.11.4 or newer.")
    with tarfile.open(archive) as file:
        for member in tqdm(file, desc=f"unpack {archive.name}", unit="file", leave=False):
            _check_name(archive, member.name)
            if not (member.isreg() or member.isdir()):
                raise UserError(f"{archive} holds a link, {member.name!r}; do not trust this archive.")
            file.extract(member, folder, filter="data")


@contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """One process of this machine at a time: the ranks of a distributed run all ask for the same file."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where runs have one process
        yield
        return
    key = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:16]
    handle = open_plain(_own_folder() / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _own_folder() -> Path:
    """A folder for locks among the temporary files, in which only this user can put anything, links least of all."""
    folder = Path(tempfile.gettempdir()) / f"metric_kd-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise UserError(
            f"{folder} is not a folder of this user alone (mode 0700); remove it, or give another place for temporary files "
            "(TMPDIR)."
        )
    return folder


def obtain(root: "str | Path", source: Source, download: bool = True) -> Path:
    """The folder (or file) that ``source`` gives in ``root``: as it lies there, unpacked, or downloaded first.

    An archive that already lies in ``root`` is verified against its md5. Raises ``UserError`` that names the file,
    where to get it and where to put it.
    """
    root = Path(root)
    target = root / source.file
    final = root / source.inner if source.inner else target
    if final.exists():
        return final
    try:
        with _exclusive(target):
            if final.exists():
                return final
            if target.exists():
                if (found := md5_of(target)) != source.md5:
                    raise UserError(
                        f"{target} has the md5 {found} instead of {source.md5}: it is incomplete or another edition; "
                        f"get it again from {source.page}."
                    )
            elif download:
                fetch(source.urls, target, source.md5, page=source.page)
            else:
                raise UserError(f"{target} is missing; get it from {source.page} and put this file here: {target}")
            return extract(target, final, source.inner) if source.inner else target
    except PermissionError as error:
        raise UserError(f"cannot write to {root} ({error.strerror}); choose another data folder.") from error


def check_counts(
    name: str, folder: Path, found: tuple[int, int], published: tuple[int, int], hint: str = "get the whole of it"
) -> None:
    """Raise ``UserError`` where a collection has not the published numbers of (images, classes)."""
    if found != published:
        raise UserError(
            f"{folder} has {found[0]:,} images in {found[1]:,} classes where {name} has {published[0]:,} in "
            f"{published[1]:,}; {hint}."
        )
