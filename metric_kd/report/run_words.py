"""What trained runs gave, in sentences: what was trained, what was kept of the teacher and lost, and how sure that is."""

from collections.abc import Sequence

import numpy as np

from metric_kd.evaluation.statistics import Interval, Paired, merged, paired
from metric_kd.report.measured import Measured, TestSet
from metric_kd.report.words import Sentence, count, percent, points, sizes

SURE = 0.05
"""Below this p-value a difference is said to be more than the choice of queries."""


def summary(test: TestSet) -> list[Sentence]:
    """Sentences about every run on one set of test images, then about how sure they are."""
    teachers = {run.teacher for run in test.networks}
    sentences = []
    for run in test.networks:
        if run.recipe is not None and run.title not in teachers:
            sentences += _about(run, test)
    if not sentences:
        sentences = [sentence for run in test.networks for sentence in _about(run, test)]
    sentences += _seeds(test)
    if any(run.hits is not None for run in test.networks):
        text = (
            "An interval says how far a figure would move with other test images of the same kind. It does not say how far "
            "it would move with another training seed, which is often a point or two: repeat runs with several seeds before "
            "you rely on a small difference."
        )
        sentences += [Sentence("How sure this is", "heading"), Sentence(text, "caution")]
    return sentences


def _about(run: Measured, test: TestSet) -> list[Sentence]:
    sentences = [Sentence(run.title, "heading"), Sentence(_trained(run, test))]
    teacher = test.network(run.teacher)
    if teacher is not None:
        sentences.append(Sentence(sizes(teacher.summary, run.summary)))
    sentences.append(Sentence(_found(run, teacher, test), "verdict"))
    if teacher is not None and run.hits is not None and teacher.hits is not None:
        sentences.append(Sentence(_kept_and_lost(run, teacher)))
        sentences.append(Sentence(_sure(run, teacher, f"its teacher “{teacher.title}”")))
    for other in test.networks:
        if run.hits is not None and other.hits is not None and _is_alone(other, run):
            sentences.append(Sentence(_sure(run, other, f"“{other.title}”, the same network without a teacher")))
    return sentences


def _trained(run: Measured, test: TestSet) -> str:
    if run.recipe is None:
        return f"A {run.base} network, read from a file."
    how = "without a teacher" if run.teacher is None else f"with the teacher “{run.teacher}”"
    recipe = run.recipe
    epochs = f"{recipe.epochs} epoch{'s' if recipe.epochs != 1 else ''}"
    losses = " + ".join(recipe.losses)
    return (
        f"A {run.base} network was trained {how} for {epochs} on {recipe.trained_on} of the data set {test.name}, to minimise "
        f"{losses}; {recipe.selection}."
    )


def _found(run: Measured, teacher: Measured | None, test: TestSet) -> str:
    metric, value = next(iter(run.scores.items()))
    if run.hits is None:
        text = f"It names the right class of {percent(value.mean)} of {count(test.queries)} new images{reach(value)}"
    else:
        text = (
            f"In {percent(value.mean)} of {count(test.queries)} searches, each with an image of a class that was not seen in "
            f"training, it puts an image of the right class first{reach(value)}"
        )
    if teacher is None or metric not in teacher.scores:
        return f"{text}."
    theirs = teacher.scores[metric].mean
    share = value.mean / theirs if theirs > 0 else 0.0
    kept = f": {100 * share:.0f}% of the teacher's {metric} is kept" if theirs > 0 and share <= 1 else ""
    return f"{text}; its teacher does so in {percent(theirs)}{kept}."


def _kept_and_lost(run: Measured, teacher: Measured) -> str:
    ours, theirs = (np.asarray(network.hits) > 0 for network in (run, teacher))
    lost, gained = int((theirs & ~ours).sum()), int((~theirs & ours).sum())
    right, wrong = int(theirs.sum()), int((~theirs).sum())
    parts = []
    if right:
        share = percent(lost / right)
        parts.append(f"of the {count(right)} queries that the teacher gets right, it loses {count(lost)} ({share})")
    if wrong:
        share = percent(gained / wrong)
        parts.append(f"of the {count(wrong)} that the teacher gets wrong, it gets {count(gained)} right ({share})")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _sure(run: Measured, other: Measured, name: str) -> str:
    """Whether the difference on the same queries is more than chance."""
    assert run.hits is not None and other.hits is not None
    found = paired(run.hits, other.hits)
    gap = found.difference
    if gap.mean == 0:
        return f"Against {name}: no difference in {_first(run)}."
    way = f"{points(abs(gap.mean))} {'ahead' if gap.mean > 0 else 'behind'}"
    sure = (
        "more than the choice of test images explains"
        if found.p < SURE and not gap.low <= 0 <= gap.high
        else "which the choice of test images alone could explain"
    )
    return f"Against {name}: {way} in {_first(run)} ({signed(gap)}, {p_value(found)}), {sure}."


def _seeds(test: TestSet) -> list[Sentence]:
    """Runs that differ in their seed alone, as one figure."""
    families: dict[str, list[Measured]] = {}
    for run in test.networks:
        if run.recipe is not None:
            families.setdefault(run.recipe.family, []).append(run)
    sentences = []
    for runs in families.values():
        if len({run.recipe.seed for run in runs if run.recipe}) < 2:
            continue
        metric = _first(runs[0])
        value = merged([run.scores[metric].mean for run in runs])
        names = ", ".join(f"“{run.title}”" for run in runs)
        sentences.append(Sentence("Several seeds", "heading"))
        text = f"{names} differ in their seed only: over {len(runs)} seeds {metric} is {percent(value.mean)}{reach(value)}."
        sentences.append(Sentence(text, "verdict"))
    return sentences


def _is_alone(other: Measured, run: Measured) -> bool:
    """Whether ``other`` is the network of ``run``, trained on the same images without a teacher."""
    if other.recipe is None or run.recipe is None or other.teacher is not None or run.teacher is None:
        return False
    same = (other.base, other.cost.size, other.recipe.fingerprint) == (run.base, run.cost.size, run.recipe.fingerprint)
    return same and other.title != run.teacher


def _first(run: Measured) -> str:
    return next(iter(run.scores))


def reach(value: Interval) -> str:
    """The interval behind a figure, in brackets; nothing where one value says nothing of it."""
    if value.low != value.low:
        return ""
    return f" (95% interval {100 * value.low:.1f} to {100 * value.high:.1f}%)"


def signed(value: Interval) -> str:
    """95% interval -1.2 to +0.4 points."""
    if value.low != value.low:
        return "one query, no interval"
    return f"95% interval {100 * value.low:+.1f} to {100 * value.high:+.1f} points".replace("-", "−")


def p_value(found: Paired) -> str:
    return "p < 0.001" if found.p < 0.001 else f"p = {found.p:.2g}"


def differences(runs: Sequence[Measured]) -> list[str]:
    """What runs on the same test images should share and do not."""
    trained = [run.recipe for run in runs if run.recipe is not None]
    sentences = []
    if len({recipe.fingerprint for recipe in trained}) > 1:
        sentences.append("The runs were not trained on the same images: their figures also differ for that reason.")
    if len({recipe.epochs for recipe in trained}) > 1:
        epochs = ", ".join(f"{run.title} {run.recipe.epochs}" for run in runs if run.recipe is not None)
        sentences.append(f"The runs were not trained for the same number of epochs ({epochs}).")
    chosen = [run.title for run in runs if run.recipe is not None and "test" in run.recipe.selection]
    if chosen:
        sentences.append(
            f"{', '.join(chosen)}: the epoch was chosen by looking at the test images, so the figures are too good."
        )
    return sentences
