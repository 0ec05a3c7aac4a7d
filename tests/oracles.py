"""Slow, obvious formulas: plain loops over rows, one line per step of the definition. Tests compare with these."""

import math

import torch
from torch import Tensor


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum().sqrt()


def huber(gap: Tensor) -> Tensor:
    return 0.5 * gap**2 if gap.abs() < 1 else gap.abs() - 0.5


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    mean_student = sum(distance(student[i], student[j]) for i, j in pairs) / len(pairs)
    mean_teacher = sum(distance(teacher[i], teacher[j]) for i, j in pairs) / len(pairs)
    total = student.new_zeros(())
    for i, j in pairs:
        total = total + huber(
            distance(student[i], student[j]) / mean_student - distance(teacher[i], teacher[j]) / mean_teacher
        )
    return total / n**2


def angle(x: Tensor, i: int, j: int, k: int) -> Tensor:
    """Cosine of the angle at i between j and k; 0 where one of them coincides with i."""
    first, second = x[j] - x[i], x[k] - x[i]
    if first.norm() < 1e-6 or second.norm() < 1e-6:
        return x.new_zeros(())
    return (first / first.norm()) @ (second / second.norm())


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    total = student.new_zeros(())
    for i in range(n):
        for j in range(n):
            for k in range(n):
                total = total + huber(angle(student, i, j, k) - angle(teacher, i, j, k))
    return total / n**3


def rkd_angle_plain(student: Tensor, teacher: Tensor) -> Tensor:
    """The formula on whole tensors, N x N x D: fast enough for larger batches, and what the benchmark compares with."""
    angles = []
    for x in (student, teacher):
        units = torch.nn.functional.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
        angles.append(torch.bmm(units, units.transpose(1, 2)).flatten())
    return torch.nn.functional.smooth_l1_loss(*angles)


def dark_rank(student: Tensor, teacher: Tensor, alpha: float, beta: float, list_length: int) -> Tensor:
    n = len(student)
    total = student.new_zeros(())
    for i in range(n):
        others = [j for j in range(n) if j != i]
        order = sorted(others, key=lambda j: distance(teacher[i], teacher[j]).item())[:list_length]
        scores = [-alpha * distance(student[i], student[j]) ** beta for j in order]
        for place, score in enumerate(scores):
            total = total - (score - torch.logsumexp(torch.stack(scores[place:]), 0))
    return total / n


def triplet(x: Tensor, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, p: int) -> Tensor:
    total = x.new_zeros(())
    for a, i, j in zip(anchor.tolist(), positive.tolist(), negative.tolist(), strict=True):
        near = (x[a] - x[i] + 1e-6).abs().pow(p).sum().pow(1 / p)
        far = (x[a] - x[j] + 1e-6).abs().pow(p).sum().pow(1 / p)
        total = total + (margin + near - far).clamp(min=0)
    return total / len(anchor)


def contrastive(x: Tensor, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    values = []
    for a, i, j in zip(anchor.tolist(), positive.tolist(), negative.tolist(), strict=True):
        values.append((x[a] - x[i] + 1e-6).square().sum())
        values.append((margin - (x[a] - x[j] + 1e-6).square().sum().sqrt()).clamp(min=0) ** 2)
    return torch.stack(values).mean()


def positive_pairs(labels: list[int]) -> list[tuple[int, int]]:
    n = len(labels)
    return [(a, p) for a in range(n) for p in range(n) if a != p and labels[a] == labels[p]]


def negatives_of(a: int, labels: list[int]) -> list[int]:
    return [j for j in range(len(labels)) if labels[j] != labels[a]]


def all_triplets(labels: list[int]) -> list[tuple[int, int, int]]:
    return [(a, p, j) for a, p in positive_pairs(labels) for j in negatives_of(a, labels)]


def hard_triplets(x: Tensor, labels: list[int]) -> list[tuple[int, int, int]]:
    chosen = []
    for a, p in positive_pairs(labels):
        negatives = negatives_of(a, labels)
        apart = [j for j in negatives if distance(x[a], x[j]) > 1e-6]
        if negatives:
            chosen.append((a, p, min(apart or negatives, key=lambda j: distance(x[a], x[j]).item())))
    return chosen


def semihard_triplets(x: Tensor, labels: list[int]) -> list[tuple[int, int, int]]:
    chosen = []
    for a, p in positive_pairs(labels):
        negatives = negatives_of(a, labels)
        farther = [j for j in negatives if distance(x[a], x[j]) > distance(x[a], x[p])]
        if farther:
            chosen.append((a, p, min(farther, key=lambda j: distance(x[a], x[j]).item())))
        elif negatives:
            chosen.append((a, p, max(negatives, key=lambda j: distance(x[a], x[j]).item())))
    return chosen


def distance_weights(
    x: Tensor, labels: list[int], cut_off: float = 0.5, nonzero_loss_cutoff: float = 1.4
) -> list[list[float]]:
    """Row-normalised weights of the negatives, in exact logarithms."""
    width, rows = x.shape[1], []
    unit = [row / row.norm() for row in x.double()]
    for a in range(len(labels)):
        logs: dict[int, float] = {}
        for j in negatives_of(a, labels):
            d = max(distance(unit[a], unit[j]).item(), cut_off)
            if d < nonzero_loss_cutoff:
                logs[j] = (2 - width) * math.log(d) - (width - 3) / 2 * math.log(1 - d * d / 4)
        if not logs:
            logs = dict.fromkeys(negatives_of(a, labels), 0.0)
        top = max(logs.values(), default=0.0)
        total = sum(math.exp(value - top) for value in logs.values())
        rows.append([math.exp(logs[j] - top) / total if j in logs else 0.0 for j in range(len(labels))])
    return rows
