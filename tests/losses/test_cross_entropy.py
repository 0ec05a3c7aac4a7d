import pytest
import torch
from torch.nn import functional as F

from metric_kd.errors import UserError
from metric_kd.functional import cross_entropy
from metric_kd.losses.term import TERMS
from metric_kd.types import Batch, Output


def example(n=4, width=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return Output(
        embedding=torch.randn(n, width, generator=generator, dtype=dtype),
        pooled=torch.randn(n, 2 * width, generator=generator, dtype=dtype),
    )


def batch(labels):
    labels = torch.tensor(labels)
    return Batch(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels, labels)


def built(student=None, classes=5, **options):
    torch.manual_seed(0)
    term = TERMS["softmax"](**options)
    term.build(student or example(), None, classes)
    return term


def test_softmax_is_an_alias():
    assert TERMS["softmax"] is TERMS["cross_entropy"]


def test_reads_the_logits_of_the_network_where_it_has_them():
    student = example()._replace(logits=torch.randn(4, 5))
    term = built(student)
    assert not list(term.parameters())
    expected = -F.log_softmax(student.logits, 1)[range(4), [0, 1, 2, 4]].mean()
    assert torch.allclose(term(student, None, batch([0, 1, 2, 4])), expected)


@pytest.mark.parametrize("features, width", [("embedding", 6), ("pooled", 12)])
def test_owns_a_classifier_otherwise(features, width):
    term, student = built(features=features), example()
    assert term.needs == (features,)
    assert [tuple(p.shape) for p in term.parameters()] == [(5, width), (5,)]
    loss = term(student, None, batch([0, 1, 2, 4]))
    logits = getattr(student, features) @ term.classifier.weight.T + term.classifier.bias
    assert torch.allclose(loss, F.cross_entropy(logits, torch.tensor([0, 1, 2, 4])))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())


def test_cosine_classifier():
    term, student = built(scale=16), example()
    assert [tuple(p.shape) for p in term.parameters()] == [(5, 6)]
    cosines = F.normalize(student.embedding) @ F.normalize(term.classifier.weight).T
    assert torch.allclose(term.logits(student), 16 * cosines, atol=1e-5)


def test_a_zero_embedding_is_finite():
    term = built(scale=16.0)
    x = torch.zeros(2, 6, requires_grad=True)
    term(Output(embedding=x), None, batch([0, 1])).backward()
    assert x.grad.isfinite().all()


def test_half_precision():
    assert (
        built(example(dtype=torch.bfloat16))(example(dtype=torch.bfloat16), None, batch([0] * 4)).dtype == torch.float32
    )
    logits = torch.tensor([[60000.0, 0.0]], dtype=torch.float16)
    assert cross_entropy(logits, torch.tensor([1])).item() == pytest.approx(60000, rel=1e-3)


def test_bad_input():
    with pytest.raises(UserError, match="labels 0 to 7; use labels 0 to 4"):
        built()(example(), None, batch([0, 1, 2, 7]))
    with pytest.raises(UserError, match="labels -1"):
        built()(example(), None, batch([0, 1, 2, -1]))
    with pytest.raises(UserError, match="gives 3 logits but there are 5"):
        built(example()._replace(logits=torch.zeros(4, 3)))
    with pytest.raises(UserError, match="two training classes"):
        built(classes=1)
    with pytest.raises(UserError, match="does not give"):
        built(Output(embedding=torch.zeros(2, 3)), features="pooled")
    with pytest.raises(UserError, match="did you mean 'pooled'"):
        TERMS["cross_entropy"](features="poled")
    for scale in (0.0, -1.0, "big", True):
        with pytest.raises(UserError, match="scale"):
            TERMS["cross_entropy"](scale=scale)
    with pytest.raises(UserError, match="build"):
        TERMS["cross_entropy"]()(example(), None, batch([0] * 4))
