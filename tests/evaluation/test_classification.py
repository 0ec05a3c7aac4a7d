"""Top-k accuracy against a count by sorting, and what happens to ties, NaN and the network's mode."""

import numpy as np
import pytest
import torch
from torch import nn

from metric_kd.errors import UserError
from metric_kd.evaluation.classification import check_top, default_top, evaluate_classification, topk_accuracy
from metric_kd.types import Batch, Output


def by_sorting(logits, labels, k):
    """Row by row: the label is among the k last of the sorted logits."""
    hits = [
        label in sorted(range(len(row)), key=row.__getitem__)[-k:] for row, label in zip(logits, labels, strict=True)
    ]
    return sum(hits) / len(hits)


def by_drawing(row, label, k, draws, generator):
    """The share of draws in which the label is among the k largest, equal ones in random order."""
    hits = 0
    for _ in range(draws):
        order = sorted(range(len(row)), key=lambda c: (-row[c], generator.random()))
        hits += label in order[:k]
    return hits / draws


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_counting_by_sorting(dtype):
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 12, generator=draw, dtype=dtype), torch.randint(0, 12, (200,), generator=draw)
    logits[torch.arange(200), labels] += 0.8
    found = topk_accuracy(logits, labels, (1, 2, 5, 12))
    assert found == {f"top{k}": by_sorting(logits.tolist(), labels.tolist(), k) for k in (1, 2, 5, 12)}
    assert 0.1 < found["top1"] < found["top2"] < found["top5"] < found["top12"] == 1
    assert topk_accuracy(logits, labels) == {key: found[key] for key in ("top1", "top5")}


def test_ties_get_what_a_fair_draw_gives_on_average():
    generator = np.random.default_rng(0)
    for row in ([1, 1, 1, 0, 2], [0, 0, 0, 0, 0], [3, 3, 1, 1, 1], [float("inf"), float("inf"), 0, 0, -float("inf")]):
        for label in range(5):
            found = topk_accuracy(torch.tensor([row], dtype=torch.float32), torch.tensor([label]), (1, 2, 3, 5))
            for k in (1, 2, 3, 5):
                assert abs(found[f"top{k}"] - by_drawing(row, label, k, 2000, generator)) < 0.05


def test_a_network_that_says_nothing_has_the_accuracy_of_chance():
    labels = torch.randint(0, 10, (50,), generator=torch.Generator().manual_seed(0))
    assert topk_accuracy(torch.zeros(50, 10), labels) == {"top1": pytest.approx(0.1), "top5": pytest.approx(0.5)}


def test_the_order_of_the_classes_does_not_matter_in_halves():
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(300, 8, generator=draw), torch.randint(0, 8, (300,), generator=draw)
    for dtype in (torch.bfloat16, torch.float16):
        rough = (logits * 0.1 + 3).to(dtype)  # few distinct values, so many ties
        assert (rough.sort(1).values.diff(dim=1) == 0).any()
        shuffle = torch.randperm(8, generator=draw)
        there = topk_accuracy(rough, labels)
        assert there == pytest.approx(topk_accuracy(rough[:, shuffle], shuffle.argsort()[labels]))
        assert there == topk_accuracy(rough.float(), labels)


def test_a_row_with_a_nan_is_a_miss():
    logits = torch.tensor([[0.0, 2.0, 1.0], [float("nan"), 2.0, 1.0], [float("nan")] * 3])
    assert topk_accuracy(logits, torch.tensor([1, 1, 1]), (1, 3)) == {"top1": pytest.approx(1 / 3)} | {
        "top3": pytest.approx(1 / 3)
    }


def test_which_k_can_be():
    assert [default_top(c) for c in (1, 2, 5, 6, 100)] == [(1,), (1,), (1,), (1, 5), (1, 5)]
    check_top((1, 5, 10), 10)
    for ks, message in (
        ([], "at least one k"),
        ([0], "k = 0 is not possible"),
        ([1.5], "k = 1.5 is not possible"),
        ([1, 11], "top-11 accuracy needs 11 classes and there are 10; choose a smaller k"),
    ):
        with pytest.raises(UserError, match=message):
            check_top(ks, 10)
    with pytest.raises(UserError, match="top-5 accuracy needs 5 classes"):
        topk_accuracy(torch.zeros(2, 3), torch.tensor([0, 1]), (1, 5))
    with pytest.raises(UserError, match="no logits"):
        topk_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_that_are_no_class_are_refused(label):
    with pytest.raises(UserError, match="the network has 3 classes"):
        topk_accuracy(torch.zeros(2, 3), torch.tensor([0, label]))
    with pytest.raises(UserError, match="the network has 7 classes"):
        evaluate_classification(Toy(), [Batch(images(2), torch.tensor([0, 8 * label]), torch.arange(2))])


class Toy(nn.Module):
    def __init__(self, classes=7):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.frozen = nn.BatchNorm1d(12), nn.BatchNorm1d(12)
        self.linear = nn.Linear(12, classes)
        self.asked = set()

    def forward(self, images, want=("embedding",)):
        self.asked.add(want)
        return Output(logits=self.linear(self.frozen(self.norm(images.flatten(1).float() / 255))))


def images(count, seed=1):
    return torch.randint(0, 256, (count, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batches(sizes=(40, 40, 7)):
    pixels, start = images(sum(sizes)), 0
    for size in sizes:
        rows = torch.arange(start, start + size)
        yield Batch(pixels[rows], rows % 7, rows)
        start += size


def test_evaluation_is_the_accuracy_of_all_logits_at_once():
    network = Toy().train()
    found = evaluate_classification(network, batches())
    whole = next(iter(batches((87,))))
    logits = network.eval()(whole.images).logits
    assert found == topk_accuracy(logits, whole.labels) and 0 < found["top1"] < found["top5"] < 1
    assert network.asked == {("logits",), ("embedding",)}
    assert evaluate_classification(network, batches(), ks=(7, 2)) == topk_accuracy(logits, whole.labels, (7, 2))
    assert list(evaluate_classification(Toy(4), [whole._replace(labels=whole.labels % 4)])) == ["top1"]


def test_modes_weights_and_gradients_are_left_alone():
    network = Toy().train()
    network.frozen.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    evaluate_classification(network, batches())
    assert network.training and network.norm.training and not network.frozen.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())

    def broken():
        yield from batches((3,))
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        evaluate_classification(network, broken())
    assert network.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_logits_are_not_kept():
    """Of many batches no more than a few may be alive at once."""
    import weakref

    alive = weakref.WeakSet()

    class Watched(Toy):
        def forward(self, images, want=("embedding",)):
            output = super().forward(images, want)
            alive.add(output.logits)
            assert len(alive) <= 2
            return output

    evaluate_classification(Watched(), batches((5,) * 12))


def test_bf16_is_close():
    exact, rough = (evaluate_classification(Toy(), batches(), precision=p) for p in ("fp32", "bf16"))
    assert rough == pytest.approx(exact, abs=0.06)


def test_progress_goes_to_stderr_only_where_asked(capsys):
    evaluate_classification(Toy(), batches())
    assert capsys.readouterr() == ("", "")
    evaluate_classification(Toy(), batches(), progress="classifying", total=3)
    out, err = capsys.readouterr()
    assert out == "" and "classifying" in err


def test_refuses_nothing_and_unknown_precision():
    with pytest.raises(UserError, match="no images"):
        evaluate_classification(Toy(), [])
    with pytest.raises(UserError, match="unknown precision 'bf61'; did you mean 'bf16'"):
        evaluate_classification(Toy(), batches(), precision="bf61")
    with pytest.raises(UserError, match="top-8 accuracy needs 8 classes"):
        evaluate_classification(Toy(), batches(), ks=(1, 8))
