"""Teachers that are read instead of run: --teacher_cache FILE with --views V, and --teacher_load FILE.npy."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from metric_kd.cli.config import DistillConfig, RunConfig, array_of
from metric_kd.cli.losses import losses_of
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords
from metric_kd.data.vectors import Vectors, read_vectors
from metric_kd.data.views import Views
from metric_kd.distill.granularity import CodedTeacher
from metric_kd.engine.cache_file import check_part
from metric_kd.engine.run_directory import check_folder
from metric_kd.engine.stored_teacher import FIELDS, StoredTeacher
from metric_kd.engine.teacher_cache import Teacher, cached
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective, wanted_of_teacher
from metric_kd.losses.term import PairTerm
from metric_kd.models.layers import LAYER
from metric_kd.models.network import Network


def views_of(config: RunConfig) -> Views | None:
    """The fixed views in which a run shows its training images."""
    return Views(config.views, config.view_seed) if isinstance(config, DistillConfig) and config.views else None


def with_stored(
    config: RunConfig,
    teacher: Network | CodedTeacher | None,
    train: ImageLoader,
    held_out: Mapping[str, ImageLoader],
    device: torch.device,
    notes: list[str],
) -> Network | CodedTeacher | StoredTeacher | None:
    """The teacher, or what is stored of it where the config says so; then nothing else needs to hold the network.

    held_out: name -> loader of images for whose test view the teacher's embedding is needed too.
    """
    if not isinstance(config, DistillConfig):
        return teacher
    array = array_of(config)
    if array is not None:
        return _array(array, config.data, train, held_out, notes)
    if config.teacher_cache is None:
        return teacher
    assert isinstance(teacher, Network)
    there = Path(config.teacher_cache).is_file()
    fields = tuple(f for f in FIELDS if f == "embedding" or f in Objective(losses_of(config)).all_needs[1])
    if config.dry_run and not there:
        notes.append(f"{config.teacher_cache} would be made first; this trial runs the teacher")
        return teacher
    asked = Teacher(teacher, device, config.precision, fields)
    stored = cached(config.teacher_cache, asked, train, held_out, batch=config.batch)
    for loader in (train, *held_out.values()):
        loader.forget_teacher()
    notes.append(f"the teacher is {'read from' if there else 'now in'} {config.teacher_cache}")
    return stored


def _array(
    file: str, data: str, train: ImageLoader, held_out: Mapping[str, ImageLoader], notes: list[str]
) -> StoredTeacher:
    vectors = read_vectors(file)
    values = vectors.values
    rows = _rows(vectors, train.records, data)
    about = {"teacher": vectors.digest()}
    held = {
        name: torch.from_numpy(values[_rows(vectors, loader.records, data)]).float()
        for name, loader in held_out.items()
    }
    notes.append(
        f"the teacher is {file}: {len(values)} vectors of length {values.shape[1]}, one for each image, whatever crop of it "
        "the student sees"
    )
    return StoredTeacher({"embedding": values[:, None]}, about, rows, held)


def _rows(vectors: Vectors, records: ImageRecords, data: str) -> np.ndarray:
    if records.paths is None:
        raise UserError(
            f"the images of {records.name} are in memory and have no paths; give a teacher that is a network."
        )
    return vectors.rows(records.paths, Path(data).parent if Path(data).is_file() else data)


def refusals(config: RunConfig) -> list[str]:
    """What a stored teacher and fixed views do not go with, one sentence each; reads no data."""
    if not isinstance(config, DistillConfig):
        return []
    sentences = []
    if config.views < 0:
        sentences.append(f"--views is {config.views}; give 1 or more, or 0 for new crops in every epoch.")
    if not 0 <= config.view_seed < 2**62:
        sentences.append(f"--view_seed is {config.view_seed}; give 0 or more, below 2^62.")
    array, cache = array_of(config), config.teacher_cache
    if array is None and cache is None:
        return sentences
    if array is not None and cache is not None:
        return [*sentences, f"--teacher_load {array} is stored already; leave --teacher_cache out."]
    if cache is not None:
        if config.views < 1:
            sentences.append(
                "--teacher_cache holds what the teacher says of fixed views of every image; give --views V too, as in "
                "--views 8."
            )
        sentences += _unwritable(Path(cache))
    elif not Path(str(array)).is_file():
        sentences.append(f"--teacher_load {array} does not exist; check the path.")
    elif not Path(str(array)).with_suffix(".csv").is_file():
        sentences.append(
            f"--teacher_load {array} has no {Path(str(array)).with_suffix('.csv')} beside it; write the paths of the images "
            "there, below the header `path`."
        )
    what = f"--teacher_load {array}" if array is not None else "--teacher_cache"
    sentences += [
        f"{what} is a teacher without a network, which --{flag} needs; leave one of them out."
        for flag in ("mutual", "granularity", "imitate", "fit_head")
        if getattr(config, flag)
    ]
    return sentences + _losses(config, what, ("embedding",) if array is not None else FIELDS)


def _unwritable(file: Path) -> list[str]:
    if file.is_dir():
        return [f"--teacher_cache {file} is a folder; give a file."]
    if file.is_symlink() and not file.exists() or file.exists() and not file.is_file():
        return [f"--teacher_cache {file} is a link to nothing, or no file of the usual kind; give another file."]
    try:
        if not file.exists():
            check_folder(file.parent, "--teacher_cache")
            check_part(file)
    except UserError as error:
        return [str(error)]
    return []


def _losses(config: DistillConfig, what: str, stored: tuple[str, ...]) -> list[str]:
    """Losses that ask more of the teacher than what is stored."""
    try:
        terms = Objective(losses_of(config)).items()
    except UserError:
        return []  # said elsewhere
    sentences = []
    for key, term in terms:
        if not term.reads_teacher:
            continue
        missing = [need for need in wanted_of_teacher(term) if need not in stored]
        if isinstance(term, PairTerm) or term.differentiates:
            why = (
                "runs the teacher's network itself" if isinstance(term, PairTerm) else "takes gradients of the teacher"
            )
        elif missing:
            why = f"reads the teacher's {missing[0].removeprefix(LAYER)}"
        else:
            continue
        sentences.append(
            f"loss {key!r} {why}, and {what} holds its {' and '.join(stored)} alone; leave one of the two out."
        )
    return sentences
