"""Rows of figures as a Markdown table for people: one line for a comparison, whatever allocators it was run with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import Row, Target

from metric_kd.errors import UserError

Entry = Mapping[str, Any]
"""What was found in one process: module, allocator, machine, and rows as :func:`plain` gives them."""
ALLOCATORS = ("default", "tuned")
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
HEAD = (
    "| what | size | ours | reference | times as fast (default / tuned allocator) | times less memory | target | reached |\n"
    "|---|---|---|---|---|---|---|---|"
)
NONE = "-"


def plain(row: Row) -> dict[str, Any]:
    """A row as JSON has it; :func:`restored` is the inverse."""
    target = {key: value for key, value in row.target._asdict().items() if value is not None}
    return {**row._asdict(), "target": target}


def restored(found: Mapping[str, Any]) -> Row:
    return Row(**{**found, "target": Target(**found["target"])})


def figure(value: float) -> str:
    """Three digits, without an exponent: 0.00123, 1.23, 12.3, 1,230."""
    if value >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


def words(target: Target, unit: str) -> str:
    """What should be reached, for people."""
    found = []
    if target.time is not None and target.time < 1:
        found.append(f"at most {figure(1 / target.time)} times its time")
    elif target.time is not None:
        tuned = "" if target.tuned is None else f" ({figure(target.tuned)} tuned)"
        found.append(f"{figure(target.time)} times as fast{tuned}")
    if target.memory is not None:
        found.append(f"{figure(target.memory)} times less memory")
    if target.most is not None:
        found.append(f"at most {figure(target.most)} {unit}")
    return ", ".join(found)


def reached(rows: Mapping[str, Row]) -> str:
    """yes, no, under which allocator alone, or nothing where there is no target; ``rows``: allocator -> the comparison.

    The target for the default allocator holds for the tuned one too, unless that has one of its own.
    """
    judged: dict[str, bool] = {}
    for allocator, row in rows.items():
        target = row.target
        time = target.tuned if allocator == "tuned" and target.tuned is not None else target.time
        wanted = [(time, row.ratio), (target.memory, row.memory_ratio)]
        checks = [value is not None and value >= least for least, value in wanted if least is not None]
        checks += [] if target.most is None else [row.ours <= target.most]
        if checks:
            judged[allocator] = all(checks)
    good = [allocator for allocator, held in judged.items() if held]
    if not judged or not good:
        return "no" if judged else ""
    return "yes" if len(good) == len(judged) else f"{' and '.join(good)} allocator only"


def line(rows: Mapping[str, Row]) -> str:
    """One comparison, of one allocator or of both; absolute figures are those of the first."""
    first = next(iter(rows.values()))
    ratios = [rows[name].ratio if name in rows else None for name in ALLOCATORS]
    fast = NONE if ratios == [None, None] else " / ".join(NONE if r is None else figure(r) for r in ratios)
    less = [row.memory_ratio for row in rows.values() if row.memory_ratio is not None]
    reference = NONE if first.peer is None else f"{figure(first.peer)} {first.unit}"
    cells = [
        first.name,
        first.size,
        f"{figure(first.ours)} {first.unit}",
        f"{reference} ({first.against})" if first.against else reference,
        fast,
        " / ".join(figure(value) for value in less) or NONE,
        words(first.target, first.unit) or NONE,
        reached(rows) or NONE,
    ]
    return f"| {' | '.join(cells)} |"


def tables(entries: Sequence[Entry]) -> str:
    """A table for each clock (CPU time on one thread, wall time on two, CUDA), each under the machines that it is of."""
    clocks: dict[str, dict[tuple[str, str, str], dict[str, Row]]] = {}
    machines: dict[str, list[str]] = {}
    for entry in sorted(entries, key=lambda entry: ALLOCATORS.index(entry["allocator"])):
        for found in entry["rows"]:
            row = restored(found)
            same = clocks.setdefault(row.clock, {}).setdefault((row.name, row.size, row.against), {})
            same[entry["allocator"]] = row
            said = machine_words(entry["machine"], row.clock)
            if said not in machines.setdefault(row.clock, []):
                machines[row.clock].append(said)
    return "\n\n".join(
        "\n".join(
            [f"{clock[0].upper()}{clock[1:]}; {'; '.join(machines[clock])}.", "", HEAD, *map(line, rows.values())]
        )
        for clock, rows in clocks.items()
    )


def machine_words(machine: Mapping[str, Any], clock: str) -> str:
    """Where and when, for people."""
    name = machine["gpu"] if clock.startswith("CUDA") and machine.get("gpu") else machine["cpu"]
    revision = "revision unknown"
    if machine["revision"]:
        changed = " with changes" if machine["revision"].endswith("+") else ""
        revision = f"revision {machine['revision'].removesuffix('+')}{changed}"
    quick = ", quick run" if machine.get("quick") else ""
    return f"{name}, {machine['cores']} cores, PyTorch {machine['torch']}, {machine['date']}, {revision}{quick}"


def check_marks(text: str, file: Path) -> None:
    """Raise ``UserError`` where a text has no place for the table."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{file} has no place for the table; put the lines {BEGIN} and {END} into it, once each.")


def written(text: str, table: str, file: Path) -> str:
    """The text with the table between its marks."""
    check_marks(text, file)
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"
