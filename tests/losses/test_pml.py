import configparser
import inspect
import sys

import pytest
import torch
from tiny import ROOT

import metric_kd.losses  # noqa: F401 (registers the namespace)
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective, option_names, parse_loss
from metric_kd.losses.pml import names
from metric_kd.losses.term import TERMS
from metric_kd.types import Batch, Output

try:
    from pytorch_metric_learning import losses as library
except ImportError:
    library = None

needs_library = pytest.mark.skipif(library is None, reason="pytorch-metric-learning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_metric_learning")
CLASSES = sorted(name for name, value in vars(library).items() if isinstance(value, type)) if library else []
REQUIRED = {"RankedListLoss": {"margin": 0.4, "Tn": 10.0}}
REFUSED = {
    *("BaseLossWrapper", "BaseMetricLossFunction", "EmbeddingRegularizerMixin", "GenericPairLoss"),
    *("WeightRegularizerMixin", "CrossBatchMemory", "MultipleLosses", "SelfSupervisedLoss"),
    *("ManifoldLoss", "SmoothAPLoss", "VICRegLoss"),
}
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
BATCH = Batch(torch.zeros(8, 3, 1, 1, dtype=torch.uint8), LABELS, torch.arange(8))


def rows(dtype=torch.float32, seed=0):
    return torch.randn(8, 16, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def built(name, classes=4, seed=0, **options):
    term = TERMS[f"pml.{name}"](**options)
    torch.manual_seed(seed)
    term.build(Output(embedding=rows()[:2].detach()), None, classes)
    return term


def require(*classes):
    """Some losses came after version 2.0."""
    lacking = [name for name in classes if not hasattr(library, name)]
    if lacking:
        pytest.skip(f"this version of pytorch-metric-learning has no {lacking[0]}")


def directly(name, seed=0, **options):
    require(name)
    torch.manual_seed(seed)
    return getattr(library, name)(**options)


@needs_library
@pytest.mark.parametrize("version", ["3.0.0", "3.1.0.dev0", "10.2"])
def test_a_version_with_other_defaults_is_refused(version, monkeypatch):
    monkeypatch.setattr("pytorch_metric_learning.__version__", version)
    with pytest.raises(UserError, match=f"below 3, got {version}.*pip install 'metric_kd\\[pml\\]'"):
        parse_loss("pml.ProxyAnchorLoss:1")


def test_every_extra_keeps_the_library_below_3():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    asked = [line for text in extras.values() for line in text.split() if line.startswith("pytorch-metric-learning")]
    assert len(asked) == 3 and set(asked) == {"pytorch-metric-learning>=2.0,<3"}
    assert "pytorch-metric-learning" in extras["test"], "the oracles of the tests are installed with them"


@needs_library
@pytest.mark.parametrize("name", CLASSES)
def test_every_loss_is_usable_or_refused_in_one_sentence(name):
    if name in REFUSED:
        assert f"pml.{name}" not in TERMS and f"pml.{name}" not in names()
        with pytest.raises(UserError, match=f"^loss 'pml.{name}' cannot be used: .*; choose another") as refused:
            TERMS[f"pml.{name}"]
        assert "\n" not in str(refused.value)
        return
    assert f"pml.{name}" in TERMS and f"pml.{name}" in names()
    term = built(name, **REQUIRED.get(name, {}))
    for step in range(3):  # a loss that carries its graph from one step to the next fails in the second
        embedding = rows(seed=step)
        loss = term(Output(embedding=embedding), None, BATCH)
        loss.backward()
        assert loss.ndim == 0 and loss.dtype == torch.float32 and loss.isfinite()
        assert embedding.grad.isfinite().all() and embedding.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())
    assert term.family == "supervised" and term.needs == ("embedding",) and not term.reads_teacher
    assert term.paper == f"pytorch-metric-learning {name}" and term.cost


SIZES = {"num_classes": 4, "embedding_size": 16}
DIRECT = [
    ("ProxyAnchorLoss", {}, SIZES),
    ("ProxyAnchorLoss", {"margin": 0.2, "alpha": 16.0}, SIZES),
    ("ArcFaceLoss", {"margin": 20.0}, SIZES),
    ("NormalizedSoftmaxLoss", {"temperature": 0.1}, SIZES),
    ("SoftTripleLoss", {"centers_per_class": 3}, SIZES),
    ("SubCenterArcFaceLoss", {"sub_centers": 2}, SIZES),
    ("SphereFaceLoss", {"margin": 3}, SIZES),
    ("P2SGradLoss", {}, {"num_classes": 4, "descriptors_dim": 16}),
    ("MultiSimilarityLoss", {"base": 0.4}, {}),
    ("TripletMarginLoss", {"margin": 0.3, "swap": True}, {}),
    ("ContrastiveLoss", {"neg_margin": 1.5}, {}),
    ("SignalToNoiseRatioContrastiveLoss", {"neg_margin": 0.5}, {}),
    ("MarginLoss", {"learn_beta": True, "nu": 0.1}, {"num_classes": 4}),
    ("RankedListLoss", {"margin": 0.4, "Tn": 5.0, "alpha": 1.1}, {}),
    ("HistogramLoss", {"n_bins": 20}, {}),
    ("DynamicSoftMarginLoss", {"num_bins": 15}, {}),
]


@needs_library
@pytest.mark.parametrize("name, options, sizes", DIRECT, ids=lambda value: value if isinstance(value, str) else None)
def test_equals_the_library(name, options, sizes):
    other = directly(name, **options, **sizes)
    term = built(name, **options)
    ours, theirs = rows(seed=1), rows(seed=1)
    loss, expected = term(Output(embedding=ours), None, BATCH), other(theirs, LABELS)
    loss.backward()
    expected.sum().backward()
    close = torch.testing.assert_close  # no bits: gradients of gathered rows are summed in any order on several threads
    close([loss, ours.grad], [expected.reshape(()), theirs.grad])
    assert [p.shape for p in term.parameters()] == [p.shape for p in other.parameters()]
    close([p.grad for p in term.parameters()], [q.grad for q in other.parameters()])


@needs_library
def test_parameters_are_seeded_trained_and_kept():
    term, again, other = (built("ProxyAnchorLoss", classes=6, seed=seed) for seed in (0, 0, 1))
    (proxies,) = term.parameters()
    assert proxies.shape == (6, 16) and torch.equal(proxies, *again.parameters())
    assert not torch.equal(proxies, *other.parameters())
    other.load_state_dict(term.state_dict())
    embedding = rows()
    loss = term(Output(embedding=embedding), None, BATCH)
    assert torch.equal(other(Output(embedding=embedding), None, BATCH), loss)
    loss.backward()
    before = proxies.detach().clone()
    torch.optim.SGD(term.parameters(), 0.1).step()
    assert not torch.equal(proxies, before)


@needs_library
def test_state_between_steps_survives_the_checkpoint():
    require("DynamicSoftMarginLoss")
    term = built("DynamicSoftMarginLoss", num_bins=20, momentum=0.5)
    for seed in range(3):
        term(Output(embedding=rows(seed=seed)), None, BATCH)
    resumed = built("DynamicSoftMarginLoss", num_bins=20, momentum=0.5)
    resumed.load_state_dict(term.state_dict())
    values = [t(Output(embedding=rows(seed=9)), None, BATCH) for t in (term, resumed)]
    fresh = built("DynamicSoftMarginLoss", num_bins=20, momentum=0.5)(Output(embedding=rows(seed=9)), None, BATCH)
    assert torch.equal(*values) and not torch.equal(values[0], fresh)


@needs_library
@pytest.mark.parametrize("name", ["ArcFaceLoss", "MultiSimilarityLoss", "LargeMarginSoftmaxLoss"])
def test_precision(name):
    expected = built(name)(Output(embedding=rows().detach().bfloat16().float()), None, BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = built(name)(Output(embedding=rows().bfloat16()), None, BATCH)
    assert lowered.dtype == torch.float32 and torch.equal(lowered, expected)
    double = built(name)(Output(embedding=rows(torch.float64)), None, BATCH)
    assert double.dtype == torch.float64 and double.isfinite()


@needs_library
def test_construction_leaves_the_random_state():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    TERMS["pml.ProxyAnchorLoss"]()
    assert torch.equal(torch.rand(3), expected)


@needs_library
def test_options_are_read_from_a_specification():
    spec = parse_loss("pml.ProxyAnchorLoss:1,margin=0.1,alpha=16,lr=0.01")
    assert spec.name == "pml.ProxyAnchorLoss" and spec.options == {"margin": 0.1, "alpha": 16.0, "lr": 0.01}
    assert parse_loss(str(spec)) == spec
    assert option_names("pml.ProxyAnchorLoss") == ["margin", "alpha", "lr"]
    signature = inspect.signature(TERMS["pml.TripletMarginLoss"].__init__)
    assert {key: (p.annotation, p.default) for key, p in signature.parameters.items() if key != "self"} == {
        "margin": (float, 0.05),
        "swap": (bool, False),
        "smooth_loss": (bool, False),
        "triplets_per_anchor": (str, "all"),
        "lr": (float | None, None),
    }
    texts = [
        *(str(spec), "pml.ContrastiveLoss:2,neg_margin=0.5", "pml.RankedListLoss:1,margin=0.4,Tn=5,alpha=null"),
        *("pml.TripletMarginLoss:1,triplets_per_anchor=3,swap=true", "pml.SoftTripleLoss:1,centers_per_class=3"),
        *("pml.HistogramLoss:1,delta=0.1", "pml.SphereFaceLoss:1,margin=3,scale=0.5"),
    ]
    require("RankedListLoss", "HistogramLoss")
    objective = Objective([parse_loss(text) for text in texts])
    assert [term.learning_rate for term in objective.terms.values()] == [0.01, *[None] * 6]
    objective.build(Output(embedding=rows()), None, 4)
    total, values = objective(Output(embedding=rows()), None, BATCH)
    assert total.isfinite() and len(values) == len(texts)
    kept = {type(term).__name__: term.loss for term in objective.terms.values()}
    assert kept["ProxyAnchorLoss"].alpha == 16 and kept["ContrastiveLoss"].neg_margin == 0.5
    assert kept["TripletMarginLoss"].triplets_per_anchor == 3 and kept["SoftTripleLoss"].centers_per_class == 3


@needs_library
@pytest.mark.parametrize(
    "text, sentence",
    [
        ("pml.proxy_anchor", "unknown loss 'pml.proxy_anchor'; did you mean 'pml.ProxyAnchorLoss'"),
        ("pml.arcfaceloss", "did you mean 'pml.ArcFaceLoss'"),
        ("pml.arcface_loss", "did you mean 'pml.ArcFaceLoss'"),  # a module of the library, not a class
        ("pml.zzz", "choose one of: pml.AngularLoss, "),
        ("pml.ArcFaceLoss:1,margn=3", "did you mean 'margin'"),
        ("pml.ArcFaceLoss:1,num_classes=3", "unknown option of loss 'pml.ArcFaceLoss': 'num_classes'"),
        ("pml.CircleLoss:1,mat_based_loss=true", "unknown option"),
        ("pml.ArcFaceLoss:1,margin=big", "is a number; got 'big'"),
        ("pml.ArcFaceLoss:1,lr=fast", "option 'lr' .* is a number; got 'fast'"),
        ("pml.ArcFaceLoss:1,lr=true", "option 'lr' .* is a number; got True"),
        ("pml.ArcFaceLoss:1,lr=0", "positive learning rate; got 0"),
        ("pml.ContrastiveLoss:1,lr=0.1", "no parameters of its own to train; remove lr"),
        ("pml.RankedListLoss", "needs margin and Tn, as in pml.RankedListLoss:1,margin=1,Tn=1"),
        ("pml.RankedListLoss:1,margin=0.4", "needs Tn, as in"),
        ("pml.RankedListLoss:1,margin=0.4,Tn=hot", "option 'Tn' .* is a number; got 'hot'"),
        ("pml.RankedListLoss:1,margin=0.4,Tn=1,imbalance=2", "cannot work as it is given: Imbalance must be between"),
        ("pml.HistogramLoss:1,n_bins=2.5", "option 'n_bins' .* is a whole number; got 2.5"),
        ("pml.HistogramLoss:1,n_bins=10,delta=0.5", "cannot work as it is given: delta and n_bins must satisfy"),
        ("pml.SoftTripleLoss:1,centers_per_class=2.5", "is of type int; got 2.5"),
        ("pml.TripletMarginLoss:1,swap=3", "is of type bool; got 3"),
        ("pml.TripletMarginLoss:1,triplets_per_anchor=some", "cannot work as it is given"),
        ("pml.PNPLoss:1,variant=X", "cannot work as it is given: variant=X but must be one of"),
        ("pml.NormalizedSoftmaxLoss:1,temperature=0", "gives no finite number"),
    ],
)
def test_refusals(text, sentence):
    if not sentence.startswith(("unknown", "did", "choose")):
        require(text.split(":")[0].removeprefix("pml."))
    with pytest.raises(UserError, match=sentence) as refused:
        Objective([parse_loss(text)])
    assert "\n" not in str(refused.value)


@needs_library
def test_refusals_of_a_caller_in_python():
    with pytest.raises(UserError, match="true or false"):
        TERMS["pml.TripletMarginLoss"](swap="yes")
    with pytest.raises(UserError, match="whole number"):
        TERMS["pml.SoftTripleLoss"](centers_per_class=2.5)
    with pytest.raises(UserError, match="is a number; got None"):
        TERMS["pml.ArcFaceLoss"](margin=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_classes'"):
        TERMS["pml.ArcFaceLoss"](num_classes=3)
    with pytest.raises(UserError, match="loss 'pml.ContrastiveLoss' refuses a batch: Number of embeddings must equal"):
        built("ContrastiveLoss")(Output(embedding=rows()), None, BATCH._replace(labels=LABELS[:3]))


@needs_library
def test_why_smooth_ap_is_refused():
    """Four perfect clusters of two images have average precision 1; once the library says so, allow the loss."""
    clusters = torch.eye(16)[:4].repeat_interleave(2, 0)
    require("SmoothAPLoss")
    wrong = library.SmoothAPLoss()(clusters, torch.arange(4).repeat_interleave(2))
    assert wrong > 0.1


@needs_library
def test_terms_are_made_once_and_not_listed():
    assert TERMS["pml.ArcFaceLoss"] is TERMS["pml.ArcFaceLoss"]
    assert not any(name.startswith("pml.") for name in TERMS)
    assert len(names()) + len(REFUSED & {*CLASSES}) == len(CLASSES) and names() == sorted(names())


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    assert names() == [] and "pml.ArcFaceLoss" not in TERMS and "cross_entropy" in TERMS
    with pytest.raises(UserError, match=r"pip install 'metric_kd\[pml\]'\.$") as refused:
        parse_loss("pml.ArcFaceLoss:1")
    assert "\n" not in str(refused.value)
