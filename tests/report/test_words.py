"""The sentences follow the numbers, also where they are not flattering."""

from dataclasses import replace

import pytest

from metric_kd.report.words import count, duration, folded, summary


def text(runs):
    return " ".join(sentence.text for sentence in summary(runs))


def verdict(runs):
    return next(sentence.text for sentence in summary(runs) if sentence.kind == "verdict")


def with_recall(runs, teacher, alone, distilled):
    return [replace(run, recall={1: value}) for run, value in zip(runs, (teacher, alone, distilled), strict=True)]


def test_a_gain(runs):
    said = text(runs)
    assert "1/16 of the teacher's parameters (100,000 against 1,600,000)" in said
    assert "with 16 numbers, where the teacher uses 128" in said
    assert "84.7% of the cases with the teacher, 72.1% with the student alone and 76.5% with the distilled" in said
    assert verdict(runs) == (
        "Distillation gained 4.4 points over the student alone: it closes 35% of the gap to the teacher, "
        "which is 12.6 points."
    )
    assert "several seeds" in said


@pytest.mark.parametrize(
    ("recalls", "said"),
    [
        ((0.8, 0.7, 0.66), "Distillation did not help here: the distilled student is 4.0 points behind"),
        ((0.8, 0.7, 0.7002), "Distillation made no difference here"),
        ((0.8, 0.7, 0.83), "gained 13.0 points over the student alone and passes the teacher by 3.0 points"),
        ((0.8, 0.7, 0.8), "gained 10.0 points over the student alone and is level with the teacher"),
        ((0.7, 0.7, 0.71), "gained 1.0 point over the student alone. The teacher is not better than the student"),
        ((0.6, 0.7, 0.68), "2.0 points behind the student alone. The teacher is not better"),
    ],
)
def test_honest_verdicts(runs, recalls, said):
    found = verdict(with_recall(runs, *recalls))
    assert said in found
    assert ("closes" in found) is False


def test_control_at_equal_compute(runs):
    control = replace(runs[1], title="More steps", role="control", recall={1: 0.8, 4: 0.9})
    assert "reaches 80.0%, 3.5 points ahead of the distilled student" in text([*runs, control])


def test_fewer_roles(runs):
    assert text(runs[:1]) == (
        "For an image of a class that was not seen in training, its nearest neighbour is of the right class in "
        "84.7% of the cases with “Big teacher”."
    )
    assert "gained 4.4 points over the student alone." in text(runs[1:])
    assert not [s for s in summary(runs[:2]) if s.kind == "verdict"]
    second = replace(runs[2], title="Distilled with angles", recall={1: 0.70, 4: 0.8})
    assert "“Distilled with angles” is 2.1 points behind" in text([*runs, second])


@pytest.mark.parametrize(
    ("teacher", "student", "said"),
    [(1000, 1000, "as many parameters"), (1000, 800, "80% of"), (1000, 1500, "1.5 times"), (1000, 100, "1/10 of")],
)
def test_sizes(runs, teacher, student, said):
    sizes = [replace(runs[0], parameters=teacher), *(replace(run, parameters=student) for run in runs[1:])]
    assert said in text(sizes)


def test_numbers_for_people():
    assert count(1234567) == "1,234,567"
    assert [duration(s) for s in (3.21, 41.3, 92.4, 3599.8, 7300)] == [
        "3.2 s",
        "41 s",
        "1 min 32 s",
        "1 h 0 min",
        "2 h 1 min",
    ]


def test_folded_commands_are_the_same_to_a_shell():
    import shlex

    command = "python run.py " + " ".join(f"--option_{k} value-{k} 'a b'" for k in range(12))
    lines = folded(command).split("\n")
    assert len(lines) > 3 and max(map(len, lines)) <= 90
    joined = folded(command).replace("\\\n", "")  # as a shell does
    assert shlex.split(joined) == shlex.split(command)
    assert folded("python run.py") == "python run.py" and folded("") == ""
