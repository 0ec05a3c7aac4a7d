"""A teacher's cache: what a frozen network says of the fixed views of every training image, in one HDF5 file.

Layout (format "metric_kd teacher cache 1"), every data set contiguous float32 and uncompressed:

    embedding, and logits where a loss reads them     (N, V, D): rows of the training images, by their number and view
    NAME/embedding                                    (H, 1, D): the test view of images that are held out
    written, lengths                                  (1 + held out,) int64: of each group of images, the rows that are in
                                                      the file and all of its rows; the same in a whole cache
    attributes: the manifest, everything that decides the numbers (:func:`manifest`); fields, what is stored of the
    teacher's output, between spaces; made_by (JSON), the machine and the versions that it was made with
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metric_kd import distributed
from metric_kd.data import decode
from metric_kd.data.loading import ImageLoader
from metric_kd.devices import autocast
from metric_kd.engine.cache_file import FORMAT, Part, check_part, read_cache
from metric_kd.engine.reproducibility import environment, weights_digest
from metric_kd.engine.stored_teacher import StoredTeacher
from metric_kd.errors import UserError
from metric_kd.locks import alone
from metric_kd.models.network import Network
from metric_kd.types import Batch

COMPARED = 8
"""Images of each loader for which the teacher is asked again at every start."""
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}
"""|said now - stored| / |stored| that other threads, batches and devices may cause."""
PLAIN = {
    "teacher": "weights",
    "network": "its form",
    "precision": "--precision",
    "geometry": "crops",
    "views": "--views",
    "view_seed": "--view_seed",
    "images": "images",
    "held_out": "held-out images",
    "files": "states of the image files",
    "pixels": "where images come from",
}
"""The keys of a manifest that must fit, in the words of the sentence that refuses another."""


class Teacher(NamedTuple):
    """A network and how it is asked; fields: what is stored of its output."""

    network: Network
    device: torch.device
    precision: str
    fields: tuple[str, ...]

    def say(self, batch: Batch) -> dict[str, Tensor]:
        """field -> (n, D) float32 on the CPU, as in a training step. Raises ``UserError`` where it is not finite."""
        images = batch.seen_by_teacher.to(self.device)
        with torch.no_grad(), autocast(self.device, self.precision):
            output = self.network(images, want=self.fields)
        said = {field: getattr(output, field).float().cpu() for field in self.fields}
        for field, values in said.items():
            if not values.isfinite().all():
                raise UserError(f"the teacher's {field} is not finite; use --precision fp32, or another teacher.")
        return said


def manifest(teacher: Teacher, train: ImageLoader, held_out: Mapping[str, ImageLoader]) -> dict[str, str | int]:
    """What decides the numbers in a cache, as its attributes."""
    assert train.views is not None
    geometry = train.geometry
    seen = geometry.teacher_input_size or geometry.input_size
    loaders = {"": train, **held_out}
    return {
        "format": FORMAT,
        "teacher": weights_digest(teacher.network),
        "network": json.dumps(teacher.network.spec.to_dict(), sort_keys=True),
        "precision": teacher.precision,
        "geometry": f"{seen} px of {geometry.crop} px of {train.side} px{', mirrored' if geometry.flip else ''}",
        "views": train.views.count,
        "view_seed": train.views.seed,
        "images": f"{len(train)} ({train.records.fingerprint()})",
        "files": _states(list(loaders.values())),
        "pixels": "files" if train.pack is None or train.pack.quality is None else f"JPEG {train.pack.quality}",
        "held_out": " ".join(f"{name}:{loader.records.fingerprint()}" for name, loader in held_out.items()) or "none",
    }


def _states(loaders: list[ImageLoader]) -> str:
    """16 hex digits over sizes and times of the image files; "in memory" without files."""
    digest, files = hashlib.sha256(), 0
    for loader in loaders:
        for path in loader.records.paths or ():
            state = decode.state_of(path)
            digest.update(f"{state.st_size} {state.st_mtime_ns} ".encode())
            files += 1
    return digest.hexdigest()[:16] if files else "in memory"


def cached(
    file: "str | Path",
    teacher: Teacher,
    train: ImageLoader,
    held_out: "Mapping[str, ImageLoader] | None" = None,
    *,
    batch: int = 64,
) -> StoredTeacher:
    """The teacher as the cache ``file`` has it, which is made first where there is none; all processes call this together.

    train: a loader with fixed views; held_out: name -> loader whose test views are stored as well. batch: images that the
    teacher sees at once. Processes share the making, and the main one writes; what a killed run has written is gone on
    with. Raises ``UserError`` where the file is of anything else than this teacher and these images, as far as its
    manifest says or a sample shows.
    """
    file, held_out = Path(file), dict(held_out or {})
    teacher.network.to(teacher.device).eval().requires_grad_(False)
    if distributed.is_main() and not file.is_file():
        check_part(file)
    wanted = manifest(teacher, train, held_out)
    if not _there(file):
        _make(file, wanted, teacher, train, held_out, batch)
        if not _there(file):
            raise UserError(f"{file} has vanished while it was made; start again.")
    content = read_cache(file)
    _check_manifest(file, content.manifest, wanted, teacher.fields)
    refusal = None
    if distributed.is_main():
        refusal = _first_difference(content.tables, teacher, train, held_out)
    refusal = distributed.from_main(refusal)
    if refusal is not None:
        raise UserError(f"{file} {refusal}; give another file, or remove it to make it again.")
    fields = {name: content.tables[name] for name in teacher.fields}
    vectors = {name: torch.from_numpy(np.array(content.tables[f"{name}/embedding"][:, 0])) for name in held_out}
    about = {"teacher": str(wanted["teacher"]), "teacher_cache": content.key}
    return StoredTeacher(fields, about, held_out=vectors)


def _there(file: Path) -> bool:
    """Whether the file is there, on which all processes must agree."""
    found = distributed.gather_objects(file.is_file())
    if any(found) and not all(found):
        raise UserError(f"only some processes see {file}; put --teacher_cache where all machines see the same files.")
    return all(found)


def _make(
    file: Path,
    wanted: Mapping[str, str | int],
    teacher: Teacher,
    train: ImageLoader,
    held_out: Mapping[str, ImageLoader],
    batch: int,
) -> None:
    """Ask the teacher for everything; the main process opens the part, and all fill it."""
    loaders = {"": train, **held_out}
    said = teacher.say(train.example(2))
    names = [[f for f in teacher.fields if not prefix or f == "embedding"] for prefix in loaders]
    shapes = {
        f"{prefix}/{field}".lstrip("/"): (len(loader), _views(loader), said[field].shape[1])
        for (prefix, loader), fields in zip(loaders.items(), names, strict=True)
        for field in fields
    }
    made_by = json.dumps(environment(teacher.device), sort_keys=True)
    content = {**wanted, "fields": " ".join(teacher.fields), "made_by": made_by}
    with ExitStack() as open_until_done:
        part = None
        if distributed.is_main():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                open_until_done.enter_context(alone(file))
                if not file.is_file():  # else another run was faster
                    part = Part(file, content, shapes, [len(loader) for loader in loaders.values()])
                    open_until_done.enter_context(closing(part))
            except OSError as error:
                raise UserError(
                    f"cannot write {file} ({error.strerror or error}); give another --teacher_cache."
                ) from error
        if distributed.from_main(distributed.is_main() and part is None):
            return
        for section, ((prefix, loader), fields) in enumerate(zip(loaders.items(), names, strict=True)):
            _fill(part, section, prefix, loader, teacher._replace(fields=tuple(fields)), batch, said)
        if part is not None:
            part.finish()
    distributed.barrier()


def _views(loader: ImageLoader) -> int:
    return 1 if loader.views is None else loader.views.count


def _fill(
    part: Part | None,
    section: int,
    prefix: str,
    loader: ImageLoader,
    teacher: Teacher,
    batch: int,
    example: Mapping[str, Tensor],
) -> None:
    """Write the rows of a section that are missing, in blocks of which each process asks the teacher for a share."""
    views = _views(loader)
    world, each = distributed.world_size(), max(1, batch // views)
    first = int(distributed.from_main(None if part is None else int(part.written[section])))
    starts = range(first, len(loader), world * each)
    own = [np.arange(s, min(s + each, len(loader))) for s in (start + distributed.rank() * each for start in starts)]
    bar = tqdm(
        total=len(loader) * views,
        initial=first * views,
        desc=f"ask the teacher{prefix and f' of {prefix}'}",
        unit="img",
        leave=False,
        mininterval=0.5,
        disable=not distributed.is_main(),
    )
    batches = loader.every_view([rows for rows in own if len(rows)])
    with bar, closing(batches) as batches:  # type: ignore[type-var]
        for start, rows in zip(starts, own, strict=True):
            if len(rows):
                said = {f: v.reshape(len(rows), views, -1) for f, v in teacher.say(next(batches)).items()}
            else:
                said = {f: torch.empty(0, views, example[f].shape[1]) for f in teacher.fields}
            whole = {field: distributed.gather_rows(values, teacher.device) for field, values in said.items()}
            if part is not None:
                named = {f"{prefix}/{f}".lstrip("/"): v.numpy() for f, v in whole.items() if v is not None}
                part.put(section, start, named)
                bar.update(len(next(iter(named.values()))) * views)


def _check_manifest(
    file: Path, held: Mapping[str, str | int], wanted: Mapping[str, str | int], fields: tuple[str, ...]
) -> None:
    """Raise ``UserError`` that says which key of the manifest is another's."""
    for key, what in PLAIN.items():
        if held.get(key) != wanted[key]:
            raise UserError(
                f"{file} was made with {key} {held.get(key)}, this run has {wanted[key]} ({what}); give another "
                "--teacher_cache, or remove the file to make it again."
            )
    missing = [field for field in fields if field not in str(held["fields"]).split()]
    if missing:
        raise UserError(
            f"{file} holds the teacher's {held['fields']} and a loss reads {missing[0]}; give another --teacher_cache, or "
            "remove the file to make it again."
        )


def _first_difference(
    tables: Mapping[str, np.ndarray], teacher: Teacher, train: ImageLoader, held_out: Mapping[str, ImageLoader]
) -> str | None:
    """What is wrong with the first of a few rows of which the teacher now says something else."""
    for prefix, loader in {"": train, **held_out}.items():
        rows = np.unique(np.linspace(0, len(loader) - 1, COMPARED).astype(int))
        views = np.arange(len(rows)) % _views(loader)
        fields = tuple(field for field in teacher.fields if not prefix or field == "embedding")
        said = teacher._replace(fields=fields).say(loader.fixed(rows, views if loader.views else None))
        for field, now in said.items():
            stored = torch.from_numpy(np.array(tables[f"{prefix}/{field}".lstrip("/")][rows, views]))
            gaps = (now - stored).norm(dim=1) / stored.norm(dim=1).clamp(min=1e-12)
            bad = torch.nonzero(~(gaps <= TOLERANCE.get(teacher.precision, max(TOLERANCE.values())))).flatten().tolist()
            if bad:
                return (
                    f"holds another {field} of {prefix or 'training'} image {rows[bad[0]]}, view {views[bad[0]]}, than the "
                    f"teacher gives now (they differ by {float(gaps[bad[0]]):.1%})"
                )
    return None
