"""What the numbers say, in sentences; they say so too where distillation did not help."""

from typing import NamedTuple

from metric_kd.report.runs import RunSummary, common_ks, with_role

TIE = 0.0005
"""Fractions closer than this are printed alike, and called equal."""


class Sentence(NamedTuple):
    """kind: "plain", "verdict" (what a hurried reader should take away), "caution", or "heading" of those that follow."""

    text: str
    kind: str = "plain"


def summary(runs: list[RunSummary]) -> list[Sentence]:
    """Sentences that compare teacher, student alone, control and every distilled student, as far as they are there."""
    k = common_ks(runs)[0]
    teacher, alone, control = (with_role(runs, role) for role in ("teacher", "alone", "control"))
    students = [run for run in runs if run.role == "distilled"]
    sentences = []
    student = students[0] if students else alone
    if teacher is not None and student is not None:
        sentences.append(Sentence(sizes(teacher, student)))
    for distilled in students:
        name = f"“{distilled.title}”" if len(students) > 1 else "the distilled student"
        named = [(teacher, "the teacher"), (alone, "the student alone"), (distilled, name)]
        sentences.append(Sentence(_found(k, [(run, words) for run, words in named if run is not None])))
        if alone is not None:
            sentences.append(Sentence(_gain(k, teacher, alone, distilled, name), "verdict"))
        if control is not None:
            sentences.append(Sentence(_against_control(k, control, distilled, name)))
    if not students:
        sentences.append(Sentence(_found(k, [(run, f"“{run.title}”") for run in runs])))
    if len(runs) > 1:
        sentences.append(
            Sentence(
                "Each network was trained once. Another seed moves these numbers, often by a point or two: "
                "repeat the runs with several seeds before you rely on a small difference.",
                "caution",
            )
        )
    return sentences


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def count(number: int) -> str:
    """1234567 -> 1,234,567."""
    return f"{number:,}"


def duration(seconds: float) -> str:
    """92.4 -> 1 min 32 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def folded(command: str, width: int = 88) -> str:
    """A command over several lines that a shell joins again; it is broken before flags only."""
    if "\n" in command or not command:
        return command
    first, *flags = command.split(" --")
    lines = [first]
    for flag in flags:
        if len(lines[-1]) + len(flag) + 5 > width:
            lines.append(f"    --{flag}")
        else:
            lines[-1] += f" --{flag}"
    return " \\\n".join(lines)


def sizes(teacher: RunSummary, student: RunSummary) -> str:
    """How much smaller the student is, and its embedding."""
    ratio = teacher.parameters / max(student.parameters, 1)
    if ratio >= 1.5:
        share = f"1/{round(ratio)} of the teacher's parameters"
    elif ratio > 1.005:
        share = f"{100 / ratio:.0f}% of the teacher's parameters"
    elif ratio > 0.995:
        share = "as many parameters as the teacher"
    else:
        share = f"{1 / ratio:.1f} times the teacher's parameters"
    numbers = f"The student has {share} ({count(student.parameters)} against {count(teacher.parameters)})"
    if student.embedding_size == teacher.embedding_size:
        return f"{numbers} and describes an image with as many numbers, {student.embedding_size}."
    return (
        f"{numbers} and describes an image with {student.embedding_size} numbers, "
        f"where the teacher uses {teacher.embedding_size}."
    )


def _found(k: int, named: list[tuple[RunSummary, str]]) -> str:
    parts = [f"{percent(run.recall[k])} with {name}" for run, name in named]
    parts[0] = parts[0].replace("%", "% of the cases", 1)
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    what = "its nearest neighbour is" if k == 1 else f"one of its {k} nearest neighbours is"
    return f"For an image of a class that was not seen in training, {what} of the right class in {listed}."


def _gain(k: int, teacher: RunSummary | None, alone: RunSummary, distilled: RunSummary, name: str) -> str:
    gain = distilled.recall[k] - alone.recall[k]
    gap = None if teacher is None else teacher.recall[k] - alone.recall[k]
    if gain < -TIE:
        text = f"Distillation did not help here: {name} is {points(-gain)} behind the student alone."
    elif gain <= TIE:
        text = f"Distillation made no difference here: {name} finds as much as the student alone."
    elif gap is None:
        return f"Distillation gained {points(gain)} over the student alone."
    elif gap <= TIE:
        text = f"Distillation gained {points(gain)} over the student alone."
    elif gain >= gap - TIE:
        beyond = f"passes the teacher by {points(gain - gap)}" if gain > gap + TIE else "is level with the teacher"
        return f"Distillation gained {points(gain)} over the student alone and {beyond}."
    else:
        return (
            f"Distillation gained {points(gain)} over the student alone: it closes {100 * gain / gap:.0f}% of the gap "
            f"to the teacher, which is {points(gap)}."
        )
    if gap is not None and gap <= TIE:
        text += " The teacher is not better than the student alone, so there was little to learn from it."
    return text


def _against_control(k: int, control: RunSummary, distilled: RunSummary, name: str) -> str:
    lead = distilled.recall[k] - control.recall[k]
    verdict = (
        f"{points(lead)} behind {name}"
        if lead > TIE
        else (f"{points(-lead)} ahead of {name}" if lead < -TIE else f"level with {name}")
    )
    return (
        f"Given the compute that the teacher cost during distillation, the student without a teacher reaches "
        f"{percent(control.recall[k])}, {verdict}."
    )


def points(fraction: float) -> str:
    value = f"{100 * fraction:.1f}"
    return f"{value} point" if value == "1.0" else f"{value} points"
