"""make_index: a folder of images as one file that is searched; resumable after any kill, and grown by the same call."""

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from metric_kd.data.decode import check_header, state_of
from metric_kd.deploy.embedder import images_in, is_image
from metric_kd.deploy.factory import EXACT_CODES_UP_TO, Factory, check_factory, choose_factory, parse_factory
from metric_kd.deploy.index_file import About, Files, IndexFile, read_index, write_index
from metric_kd.deploy.index_part import Part, check_part, part_of, remove_part
from metric_kd.deploy.model import Model
from metric_kd.deploy.vector_index import VectorIndex, build, check_faiss
from metric_kd.errors import UserError
from metric_kd.locks import alone
from metric_kd.scratch import sweep_beside

GROWN = 2
"""Times the vectors that the lists of factory auto were trained on: from there on they are trained again."""


@dataclass(frozen=True)
class Made:
    """What was done. content: as it lies in the file now; added, changed, removed: images; unchanged: none of them, the
    file is as it was; skipped: names of unreadable images; notes: sentences."""

    content: IndexFile
    added: int
    changed: int
    removed: int
    skipped: tuple[str, ...]
    vectors: np.ndarray | None
    notes: tuple[str, ...]

    @property
    def unchanged(self) -> bool:
        return not (self.added or self.changed or self.removed)


def make_index(
    model: Model,
    images: "str | Path",
    file: "str | Path",
    *,
    factory: str = "auto",
    keep_vectors: str | None = None,
    batch: int = 64,
    precision: str = "fp32",
    skip_unreadable: bool = False,
    progress: bool = False,
) -> Made:
    """Embed all images of a folder and write the index, or bring an earlier one of this folder up to date.

    Embeddings go to ``file.part`` block by block, and a killed call goes on behind them; ``file`` appears, or is replaced,
    at the end and at once. An earlier index gets the new images, loses those that are gone, and those that changed (by size
    or time) are embedded again; lists stay as they were trained, except with factory "auto" when it has outgrown them. A
    graph (HNSW) is built again where something was taken out.

    factory: see :mod:`metric_kd.deploy.factory`; keep_vectors: "float16" or "float32" beside the codes of PQ. Raises
    ``UserError`` for what cannot be, as far as possible before anything is embedded: no images, no room, too few images for
    the factory, an earlier file of another model, folder or factory, a file that is something else.
    """
    file, root = Path(file), str(Path(images).resolve())
    check_file(file)
    about = _about(model, root, precision, factory, keep_vectors)
    try:
        with alone(file, f"another process is writing {file}; wait for it, or give another --out."):
            for path in (file, part_of(file)):
                sweep_beside(path)
            old = read_index(file) if file.exists() else None
            if old is not None:
                _check_same(old.about, about, file)
            return _make(model, about, old, file, batch, skip_unreadable, progress)
    except PermissionError as error:
        raise UserError(f"cannot write {file} ({error.strerror}); choose another --out.") from error


def check_file(file: Path) -> None:
    """Raise ``UserError`` where a file cannot be written; cheap."""
    if file.is_dir():
        raise UserError(f"--out {file} is a folder; give the name of a file.")
    if file.exists() and not file.is_file():
        raise UserError(f"--out {file} is no file of the usual kind; give the name of another.")
    if is_image(file):
        raise UserError(f"--out {file} ends as an image does, and would be taken for one; give another name.")
    if not file.parent.is_dir():
        raise UserError(f"--out {file}: the folder {file.parent} does not exist; create it first.")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"--out {file}: the folder {file.parent} cannot be written; choose another one.")
    check_part(file)


def _about(model: Model, root: str, precision: str, factory: str, keep_vectors: str | None) -> About:
    if factory != "auto":
        parsed = parse_factory(factory)
        check_faiss(parsed)
        check_factory(parsed, parsed.least, model.dimensions)
        if keep_vectors is not None and not parsed.pieces:
            raise UserError(f"--factory {factory} holds the vectors themselves; leave --keep_vectors out.")
    if keep_vectors not in (None, "float16", "float32"):
        raise UserError(f"--keep_vectors is {keep_vectors}; give float16 or float32.")
    return About(
        model_path=model.path,
        model_digest=model.digest,
        model=model.what,
        normalised=model.normalised,
        images=root,
        precision=precision,
        dimensions=model.dimensions,
        asked=factory,
        keep_vectors=keep_vectors,
        origin=model.origin,
        weights=model.weights,
    )


def _check_same(old: About, new: About, file: Path) -> None:
    """Raise ``UserError`` where an index was made otherwise than it is asked for now."""
    ways = {
        "model_digest": f"another model ({old.model_path}: {old.model})",
        "images": f"another folder ({old.images})",
        "precision": f"--precision {old.precision}",
        "asked": f"--factory {old.asked}",
        "keep_vectors": f"--keep_vectors {old.keep_vectors}" if old.keep_vectors else "no --keep_vectors",
    }
    for field, way in ways.items():
        if getattr(old, field) != getattr(new, field):
            raise UserError(f"{file} was made with {way}; give that, or another --out.")


def _make(
    model: Model, about: About, old: IndexFile | None, file: Path, batch: int, skip_unreadable: bool, progress: bool
) -> Made:
    listed = _listed(about.images)
    keys = listed.identities()
    before = set() if old is None else set(old.files.identities())
    now = set(keys)
    keep = np.array([] if old is None else [key in now for key in old.files.identities()], bool)
    todo = listed.select(np.array([k for k, key in enumerate(keys) if key not in before], np.int64))
    if about.asked != "auto" and not keep.any():  # or else nothing is trained
        check_factory(parse_factory(about.asked), len(keys), about.dimensions)
    if not skip_unreadable:
        for name in todo.names:
            check_header(os.path.join(about.images, name))
    fresh, vectors, skipped = todo, np.empty((0, about.dimensions), np.float32), list[str]()
    if len(todo):
        _check_room(file, len(keys), len(todo), about)
        with contextlib.closing(Part(file, model, about.images, about.precision, todo)) as part:
            try:
                part.fill(batch, skip_unreadable, progress)
            except UserError:
                if not part.written:
                    remove_part(file)
                raise
            fresh, vectors, skipped = part.result()
    if not keep.any() and not len(fresh):
        raise UserError(f"none of the images in {about.images} can be read; check --images.")
    names_before = set() if old is None else set(old.files.names)
    changed = len(names_before & set(fresh.names))
    counts = {"added": len(fresh) - changed, "changed": changed, "removed": int((~keep).sum()) - changed}
    if old is not None and not any(counts.values()):
        remove_part(file)
        return Made(replace(old, about=about), **counts, skipped=tuple(skipped), vectors=None, notes=())
    index, notes = _index(about, old, keep, vectors)
    files = fresh if old is None else old.files.select(np.flatnonzero(keep)).joined(fresh)
    content = IndexFile(about, files, index)
    write_index(file, content)
    remove_part(file)
    there = vectors if len(vectors) == len(index) else None
    return Made(content, **counts, skipped=tuple(skipped), vectors=there, notes=tuple(notes))


def _index(about: About, old: IndexFile | None, keep: np.ndarray, vectors: np.ndarray) -> tuple[VectorIndex, list[str]]:
    """The old index without what is gone and with the new (M, D) vectors, or a new one."""
    count = int(keep.sum()) + len(vectors)
    notes: list[str] = []
    if old is None or not keep.any():
        factory = _resolved(about, count, notes)
        check_factory(factory, count, about.dimensions)
        return build(factory, vectors, about.keep_vectors), notes
    index = old.index
    factory = index.factory if about.asked != "auto" else _resolved(about, count, notes)
    outgrown = about.asked == "auto" and (
        factory.kind != index.factory.kind and count > len(index) or count > GROWN * max(index.trained, 1) > GROWN
    )
    if outgrown:
        there = index.vectors()
        if there is None:
            notes.append(
                f"{index.factory} was trained on {index.trained:,} images and holds {count:,} now; as it keeps codes only, "
                "another --out is the way to train it again"
            )
        else:
            notes.append(f"{index.factory} has become {factory}, as there are {count:,} images now")
            return build(factory, np.concatenate([there[keep], vectors]), about.keep_vectors), notes
    elif index.factory.lists and count > GROWN * index.trained:
        notes.append(
            f"the lists of {index.factory} were trained on {index.trained:,} images and hold {count:,} now; another --out "
            "trains them again"
        )
    if index.factory.kind == "HNSW" and not keep.all():
        notes.append("the graph was built again: nothing can be taken out of it")
    return index.updated(keep, vectors), notes


def _resolved(about: About, count: int, notes: list[str]) -> Factory:
    """The factory of so many vectors."""
    if about.asked != "auto":
        return parse_factory(about.asked)
    factory = choose_factory(count, about.dimensions)
    try:
        check_faiss(factory)
    except UserError as error:
        notes.append(f"Flat instead: {error}")
        return Factory("Flat")
    if about.keep_vectors is not None and not factory.pieces:
        notes.append(
            f"{factory} holds the vectors themselves; --keep_vectors adds nothing before {EXACT_CODES_UP_TO:,}"
        )
    return factory


def _listed(root: str) -> Files:
    """The image files below a folder as they are now."""
    paths = images_in(root)
    states = [state_of(path) for path in paths]
    sizes = np.array([state.st_size for state in states], np.int64)
    modified = np.array([state.st_mtime_ns for state in states], np.int64)
    return Files([os.path.relpath(path, root) for path in paths], sizes, modified)


def _check_room(file: Path, count: int, fresh: int, about: About) -> None:
    """Raise ``UserError`` where the disk has no room for the embeddings and the file beside them."""
    need = 4 * about.dimensions * (count + fresh)
    free = shutil.disk_usage(file.parent).free
    if need > free:
        raise UserError(
            f"the index needs up to {need / 2**30:.2f} GiB and {file.parent} has {free / 2**30:.2f} GiB free; make room, or "
            "write it elsewhere."
        )
