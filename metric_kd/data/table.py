"""Any CSV table of images and labels."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from metric_kd.data.parts import split_parts, split_whole
from metric_kd.data.records import DATASETS, ImageRecords, Splits, Task
from metric_kd.errors import UserError

TRUE, FALSE = ("1", "true", "yes"), ("0", "false", "no")


@DATASETS.register("table")
def table(
    root: "str | Path",
    *,
    train_classes: "int | list[str] | None" = None,
    task: Task = "embedding",
    flip: bool = True,
) -> Splits:
    """A CSV file with the columns path and label, and optionally split, query and gallery.

    root: the file, or a folder that holds ``table.csv``. Relative paths start at the file's folder. split: train or
    test; without it the classes are halved, or, for a classifier, one in five images of each class tests. query,
    gallery: 0/1 or false/true, which test images ask and which are searched; a classifier does not read them. flip:
    false for things that a mirror changes. Raises ``UserError`` that names the row.
    """
    file = Path(root)
    file = file / "table.csv" if file.is_dir() else file
    rows = list(_rows(file))
    if not rows:
        raise UserError(f"{file} has no rows; give it one row per image.")
    first = rows[0][1]
    wanted = ("query", "gallery") if task == "embedding" else ()
    flags = {name: _flags(file, rows, name) for name in wanted if name in first}
    labels = [row["label"] for _, row in rows]
    names = tuple(sorted(set(labels)))
    number = {name: k for k, name in enumerate(names)}
    records = ImageRecords(
        "table",
        np.array([number[label] for label in labels], dtype=np.int64),
        names,
        paths=tuple(row["path"] for _, row in rows),
        query=flags.get("query"),
        gallery=flags.get("gallery"),
        flip=flip,
    )
    if "split" not in first:
        splits = split_whole(records, train_classes, task)
    else:
        train, test = _by_column(file, rows, records)
        splits = split_parts(train, test, train_classes, task)
    for name, column in (("query", splits.test.query), ("gallery", splits.test.gallery)):
        if column is not None and not column.any():
            raise UserError(f"{file} marks no test image as {name}; set {name} to 1 in some rows.")
    return splits


def _by_column(file: Path, rows: "list[tuple[int, dict]]", records: ImageRecords) -> tuple[ImageRecords, ImageRecords]:
    for line, row in rows:
        if row["split"] not in ("train", "test"):
            raise UserError(f"{file}, row {line}: split is {row['split']!r}; write train or test.")
    train = np.array([row["split"] == "train" for _, row in rows])
    if train.all() or not train.any():
        raise UserError(f"{file} has only {rows[0][1]['split']} rows; mark others, or remove the column split.")
    return records.select(train), records.select(~train)


def _rows(file: Path) -> "Iterator[tuple[int, dict[str, str]]]":
    """(line number, row) with stripped cells and absolute paths, every one checked."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = [(c or "").strip() for c in reader.fieldnames or []]
            for needed in ("path", "label"):
                if needed not in columns:
                    raise UserError(f"{file} has no column {needed!r} but {', '.join(columns) or 'nothing'}; add it.")
            reader.fieldnames = columns
            for row in reader:
                line = reader.line_num
                if None in row or None in row.values():
                    raise UserError(f"{file}, row {line} has not {len(columns)} cells; quote cells that hold commas.")
                cells = {key: value.strip() for key, value in row.items()}
                if not cells["label"]:
                    raise UserError(f"{file}, row {line} has no label; give it one or remove it.")
                cells["path"] = os.path.join(file.parent, cells["path"])
                if not os.path.isfile(cells["path"]):
                    raise UserError(f"{file}, row {line}: the image {cells['path']} does not exist; mend the path.")
                yield line, cells
    except OSError as error:
        raise UserError(f"cannot read the table {file} ({error.strerror}); point --data at a CSV file.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is no UTF-8 CSV file ({error}); save it as one.") from error


def _flags(file: Path, rows: "list[tuple[int, dict]]", name: str) -> np.ndarray:
    values = []
    for line, row in rows:
        value = row[name].lower()
        if value not in TRUE + FALSE:
            raise UserError(f"{file}, row {line}: {name} is {row[name]!r}; write 1 or 0.")
        values.append(value in TRUE)
    return np.array(values, dtype=bool)
