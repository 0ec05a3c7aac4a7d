"""Every method with every kind of pair of networks: it trains in all of its stages, or refuses before any training."""

import copy
import inspect
import re
from functools import cache

import pytest
import torch

import metric_kd.distill  # noqa: F401 (registers the methods)
import metric_kd.functional
from metric_kd.cli.listing import main as list_main
from metric_kd.distill.feature.lwm import class_attention
from metric_kd.distill.granularity import CodedTeacher, Encoders
from metric_kd.engine.coding import coders_for
from metric_kd.engine.mutual import Mutual
from metric_kd.engine.tasks import Solo
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective, parse_loss, require_provided
from metric_kd.losses.term import TERMS
from metric_kd.models.network import NetworkSpec, build_network
from metric_kd.types import Batch

METHODS = [n for n in TERMS if TERMS[n].reads_teacher and TERMS[n].__module__.startswith("metric_kd.distill.")]
PAIRS = {
    "equal": ("resnet8_x0.25:stem_stride=2", "resnet8_x0.25:stem_stride=2", 32),
    "wider": ("resnet8_x0.25:stem_stride=2", "wrn_10_2", 16),  # other widths, grids and kinds of pre-activations
    "coarser": ("resnet8_x0.25", "resnet8_x0.5:stem_stride=4", 16),  # maps down to 1x1
    "foreign": ("mobilenet_v3_small", "resnet8:stem_stride=2", 64),  # five stages beside four, no pre-activations
}
TASKS = ("classification", "embedding")
READ_LOGITS = {"bss", "dml", "irg", "logits", "lwm", "sobolev", "st"}
REFUSED = {
    "wider": {"csd", "imitate"},  # features of other lengths
    "coarser": {"csd", "imitate", "nst"},  # one position: nothing to compare
    # No pre-activations; hardsigmoid has no second derivative.
    "foreign": {"ab", "csd", "imitate", "ofd", "lwm", "sobolev"},
}
EQUAL = {"imitate": "imitate:1,layer=logits"}
"""How a method is written that every pair of classifiers can serve."""
LABELS = torch.arange(24) % 4


def is_refused(name, pair, task):
    """By hand, so that a method which begins to refuse a pair, or to accept one, is noticed."""
    return (task == "embedding" and name in READ_LOGITS) or name in REFUSED.get(pair, ())


@cache
def original(base, size, width, seed):
    torch.manual_seed(seed)
    spec = NetworkSpec(base, width or 0, bool(width), size, num_classes=None if width else 4)
    network = build_network(spec)
    if network.classifier is not None:  # both networks see class 0: bss only attacks what both get right
        torch.nn.init.constant_(network.classifier.bias[:1], 20.0)
    return network


def networks(pair, task):
    """Copies of a student and a teacher; embeddings of 8 and 12 numbers, or of the pooled feature beside a classifier."""
    student, teacher, size = PAIRS[pair]
    widths = {"classification": (None, None), "embedding": (8, 8 if pair == "equal" else 12)}[task]
    pairs = zip((student, teacher), widths, (0, 1), strict=True)
    return [copy.deepcopy(original(base, size, width, seed)) for base, width, seed in pairs]


def with_codes(teacher):
    """The teacher with random coders, as --granularity_load gives it."""
    field = "embedding" if teacher.spec.num_classes is None else "logits"
    return CodedTeacher(teacher, coders_for(teacher, field, 4, 8))


def batch(pair, *rows):
    indices = torch.tensor(rows)
    size = PAIRS[pair][2]
    images = torch.randint(0, 256, (24, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return Batch(images[indices], LABELS[indices], indices)


def losses_for(spec):
    """The method alone where it acts in the main stage, so that what moves moves because of it."""
    loss = parse_loss(spec)
    alone = TERMS[loss.name](**loss.options).acts_in_main
    return [loss] if alone else [loss, parse_loss("cross_entropy:1")]


def built(spec, pair, task, precision="fp32"):
    """The task as the session makes it; ``UserError`` where it refuses."""
    student, teacher = networks(pair, task)
    losses = losses_for(spec)
    torch.manual_seed(3)
    made: Solo | Mutual
    if losses[0].name == "dml":
        require_provided("student", student.provides, Objective(losses))
        made = Mutual({"student": student, "peer": teacher}, losses, precision)
    else:
        if losses[0].name == "granularity":
            teacher = with_codes(teacher)
        objective = Objective(losses)
        require_provided("student", student.provides, objective)
        require_provided("teacher", teacher.provides, objective, teacher=True)
        made = Solo(student, teacher, objective, precision)
    made.build(batch(pair, 0, 1), 4, LABELS)
    return made.train()


def one_step(task, data):
    """The values of the losses."""
    parameters = [p for group in task.parameter_groups() for p in group["params"]]
    optimizer = torch.optim.SGD(parameters, 1e-3)
    total, values = task(data)
    total.backward()
    for value in (total, *values.values(), *(p.grad for p in parameters if p.grad is not None)):
        assert value.isfinite().all()
    optimizer.step()
    optimizer.zero_grad()
    return values


def trained(task):
    """What may move: the student's weights, or those of the terms where a stage leaves the student alone."""
    alone = isinstance(task, Solo) and not task.objective.runs_student
    return {k: v.clone() for k, v in (task.objective if alone else task.student).named_parameters()}


def train(task, pair):
    """Two steps in every stage, the second on one image: the first moves weights, all stays finite, every loss acts."""
    acted = set()
    for stage in [*task.stages(), None]:
        task.enter(stage)
        if stage is None:
            task.begin_epoch(5, 10)
        before = trained(task)
        values = one_step(task, batch(pair, 0, 1, 2, 3, 4, 8))
        acted |= {name for name, value in values.items() if value != 0}
        assert any(not torch.equal(before[k], v) for k, v in trained(task).items()), f"nothing learns in {stage}"
        one_step(task, batch(pair, 4) if isinstance(task, Solo) else batch(pair, 4, 5))  # two, for a peer's 1x1 maps
    assert acted == set(task.loss_names), "a loss that never acts"
    assert all(v.isfinite().all() for v in task.state_dict().values())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", METHODS)
def test_trains_or_refuses(name, pair, task):
    if is_refused(name, pair, task):
        with pytest.raises(UserError) as refusal:
            built(name, pair, task)
        sentence = str(refusal.value)
        assert sentence.endswith(".") and "\n" not in sentence and ";" in sentence, "what is wrong; what to do."
        return
    made = built(name, pair, task)
    if isinstance(made, Mutual):
        train(made, pair)
        return
    before = copy.deepcopy(made.teacher.state_dict())
    train(made, pair)
    assert all(torch.equal(before[k], v) for k, v in made.teacher.state_dict().items()), "statistics included"
    assert not any(module.training for module in made.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())


VARIANTS = """ab:1,in_main=true at:1,reduction=sum,layers=0/1/2/3 bss:2,batch_norm=update crd:1,mode=relax,negatives=3
    fitnet:1,connector=regressor fitnet:1,embedding=false fsp:1,in_main=true ft:200,batch_norm=true
    irg:1,mode=all_to_all irg:1,preset=caffe irg:1,preset=caffe_transformation irg:1,preset=paper kdsvd:1,k=2
    lwm:1,form=zoo,layer=1 nst:1,layers=1/2/3 rkd:1,angle=0 sp:1,features=embedding vid:1,mid_factor=0.5""".split()


@pytest.mark.parametrize("spec", VARIANTS)
def test_variants_train(spec):
    train(built(spec, "wider", "classification"), "wider")


@pytest.mark.parametrize("spec", ["irg:1,vertex=0", "irg:1,vertex=0,preset=paper", "irg:1,vertex_on=embedding"])
def test_irg_of_embeddings(spec):
    train(built(spec, "equal", "embedding"), "equal")


def test_lwm_refuses_maps_beside_the_way_to_the_logits():
    """A transformer's maps are its tokens, rearranged for us: nothing is computed from them."""
    tokens = torch.randn(2, 4, 3, requires_grad=True)
    maps = tokens.transpose(1, 2).unflatten(2, (2, 2))
    with pytest.raises(UserError, match="not copies, as a transformer's are; choose convolutional"):
        class_attention(tokens.mean(1), LABELS[:2], maps)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_methods_at_once(precision):
    """Their stages follow each other, and what one asks of the networks (gradients, other fields) harms no other."""
    student, teacher = networks("wider", "classification")
    teacher = with_codes(teacher)
    specs = [EQUAL.get(name, f"{name}:1") for name in METHODS if name != "csd"]  # which wants equal lengths
    task = Solo(student, teacher, Objective([parse_loss(spec) for spec in specs]), precision)
    task.build(batch("wider", 0, 1), 4, LABELS)
    assert [stage.name for _, stage in task.stages()] == ["ab", "fsp", "ft"]
    before = copy.deepcopy(teacher.state_dict())
    train(task.train(), "wider")
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_bf16(name):
    pair = "equal" if name == "csd" else "wider"
    train(built(EQUAL.get(name, name), pair, "classification", precision="bf16"), pair)


@pytest.mark.parametrize("name", METHODS)
def test_a_weight_of_zero_costs_nothing(name, monkeypatch):
    losses = [parse_loss("cross_entropy:1"), parse_loss(f"{name}:0")]
    monkeypatch.setattr(TERMS[name], "__init__", None)  # what is not made cannot fail
    objective = Objective(losses)
    assert objective.names == ["cross_entropy"] and len(objective.terms) == 1
    assert objective.all_needs == (("embedding",), ()) and not objective.differentiates and not objective.stages()


@pytest.mark.parametrize("name", METHODS)
def test_peers_teach_both_ways_or_are_refused_at_once(name):
    student, peer = networks("equal", "classification")
    losses = [parse_loss("cross_entropy:1"), parse_loss(name)]
    if name in ("ab", "bss", "crd", "fsp", "ft", "lwm", "sobolev"):
        with pytest.raises(UserError, match=f"loss '{name}' .* cannot teach both ways; leave it out of --mutual"):
            Mutual({"student": student, "peer": peer}, losses)
        return
    both = {"student": student, "peer": peer}
    encoders = {key: Encoders(network.pooled_size, 4, 8) for key, network in both.items()}
    task = Mutual(both, losses, encoders=encoders if name == "granularity" else None)
    task.build(batch("equal", 0, 1), 4, LABELS)
    train(task.train(), "equal")


def documentation(name):
    """The docstrings of a method's term and of the pure functions in its file."""
    term = TERMS[name]
    module = inspect.getmodule(term)
    pure = [f for n, f in vars(module).items() if n in metric_kd.functional.__all__ and inspect.isfunction(f)]
    return " ".join(inspect.getdoc(thing) or "" for thing in (term, *pure))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_where_it_comes_from(name):
    paper, text = TERMS[name].paper, documentation(name)
    year = re.search(r"\b(?:19|20)\d\d\b", paper)
    assert year and year[0] in text
    source = re.search(r"arXiv \d{4}\.\d{5}|arXiv \d{4}\.\d{4}|doi 10\.\S+|\w+$", paper)
    assert source and source[0].rstrip(".") in text
    assert paper.split(",")[0].split(":")[0] in text, "the title, or its beginning"


def test_list_methods_shows_what_each_is(capsys):
    assert list_main(["methods"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["method", "family", "needs", "cost", "weight", "paper"]
    shown = {line.split()[0]: line for line in lines}
    for name in METHODS:
        term = TERMS[name]
        assert term.family in ("logit", "feature", "relational") and term.cost and term.default_weight > 0
        cells = [name, term.family, "+".join(term.needs), term.cost, f"{term.default_weight:g}", term.paper]
        assert re.split(r"\s{2,}", shown[name]) == cells
