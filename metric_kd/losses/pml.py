"""Any loss of pytorch-metric-learning as a term: ``--loss pml.ProxyAnchorLoss:1,alpha=32,lr=0.01``."""

import difflib
import functools
import inspect
import math
import warnings
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output

PREFIX = "pml."

TOO_NEW = 3
"""The first major version that is another library under the same names: defaults, distances and samplers changed."""

REFUSED = {
    "CrossBatchMemory": "it wraps another loss",
    "MultipleLosses": "it wraps other losses, each of which can be a --loss of its own",
    "SelfSupervisedLoss": "it wraps another loss and compares two views of each image",
    "ManifoldLoss": "it takes no labels",
    "VICRegLoss": "it takes no labels",
    # Up to 2.9 at least it reads the batch as rows of one class each, with the two sizes exchanged: four perfect
    # clusters of two images give 0.19 for 0, and another order of the batch another value.
    "SmoothAPLoss": "its value depends on the order of the batch",
    "GenericPairLoss": "it is a base class",
}

_SIZES = ("num_classes", "embedding_size", "descriptors_dim")
"""Filled in from the data and the embedding."""

_OBJECTS = (
    "collect_stats distance embedding_reg_weight embedding_regularizer reducer weight_init_func weight_reg_weight "
    "weight_regularizer"
).split()
"""Parts that no option can spell, and what only matters with them: they stay as the library has them."""

_COUNTS = ("centers_per_class", "margin", "num_bins", "sub_centers")
"""Whole numbers where their default is one; elsewhere the library writes 1 and means 1.0."""


class MetricLearningTerm(Term):
    """A loss of pytorch-metric-learning on the embeddings and labels, in at least float32 and without autocast.

    Options are the plain parameters of the library's constructor; ``num_classes`` and ``embedding_size`` are filled in;
    distance, reducer and regularisers stay at the library's defaults. ``lr``: learning rate of the loss's own
    parameters, by default the run's. MarginLoss has one beta for each class. Raises ``UserError`` at construction for
    what the library refuses, and for ``lr`` where the loss has no parameters.

    Musgrave, Belongie, Lim: PyTorch Metric Learning, 2020, arXiv 2008.09164. Deviation: tensors that a loss keeps
    between steps (the histogram of DynamicSoftMarginLoss) are buffers, so that they are in the checkpoint, and are
    detached after each step, without which the library's second backward fails.
    """

    reads_labels = True
    relates = True
    cost = "see pytorch-metric-learning"
    name: ClassVar[str]
    loss_class: ClassVar[type[nn.Module]]

    def __init__(self, lr: float | None = None, **options: Any):
        super().__init__()
        self.learning_rate = None if lr is None else _number(self.name, "lr", lr)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(f"option 'lr' of loss {self.name!r} is a positive learning rate; got {lr!r}.")
        given = _parameters(self.loss_class)
        required = [key for key, p in given.items() if p.default is p.empty and key not in _SIZES]
        missing = [key for key in required if options.get(key) is None]
        if missing:
            example = ",".join(f"{key}=1" for key in missing)
            raise UserError(f"loss {self.name!r} needs {' and '.join(missing)}, as in {self.name}:1,{example}.")
        self._options = {key: _given(self.name, given[key], value) for key, value in options.items()}
        self._sizes = [key for key in _SIZES if key in given]
        self.loss: nn.Module | None = None
        trial = self._tried()
        if self.learning_rate is not None and next(trial.parameters(), None) is None:
            raise UserError(f"loss {self.name!r} has no parameters of its own to train; remove lr.")

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        assert student.embedding is not None
        loss = self._made(num_classes, student.embedding.shape[1])
        for module in loss.modules():
            for key, value in list(vars(module).items()):
                if isinstance(value, Tensor):
                    delattr(module, key)
                    module.register_buffer(key, value)
        self.loss = loss.to(student.embedding.device)

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None and self.loss is not None
        embedding = at_least_float32(student.embedding)
        with full_precision(embedding):
            try:
                value: Tensor = self.loss(embedding, batch.labels)
            except (ValueError, AssertionError) as error:
                raise UserError(f"loss {self.name!r} refuses a batch: {_first_line(error)}") from error
        for module in self.loss.modules():
            for key, state in module.named_buffers(recurse=False):
                if state.requires_grad:
                    setattr(module, key, state.detach())
        return value.reshape(())

    def _made(self, num_classes: int, width: int) -> nn.Module:
        sizes = {key: num_classes if key == "num_classes" else width for key in self._sizes}
        return self.loss_class(**sizes, **self._options)

    def _tried(self) -> nn.Module:
        """A small loss that has met one ordinary batch: what it cannot do is refused before any data are read."""
        rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the loss that is trained will say it again
            try:
                loss = self._made(4, 16)
                value = loss(rows, torch.arange(4).repeat_interleave(2))
            except Exception as error:  # the library checks by assert, by ValueError, by TypeError, or not at all
                raise UserError(f"loss {self.name!r} cannot work as it is given: {_first_line(error)}") from error
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite().all():
            raise UserError(f"loss {self.name!r} gives no finite number as it is given; check its options.")
        return loss


def names() -> list[str]:
    """The losses that can be used, as ``pml.ArcFaceLoss``; empty where the library is not installed."""
    try:
        library = _library()
    except UserError:
        return []
    return [PREFIX + name for name in _classes(library) if _refusal(library, name) is None]


def resolve(name: str) -> type[Term]:
    """The term of a loss class. Raises ``UserError`` where it is unknown or cannot be used."""
    library = _library()
    classes = _classes(library)
    if name not in classes:
        close = difflib.get_close_matches(_folded(name), map(_folded, classes), n=1, cutoff=0.5)
        raise one_of("loss", PREFIX + name, [PREFIX + c for c in classes if _folded(c) in close] or names())
    refusal = _refusal(library, name)
    if refusal is not None:
        raise UserError(f"loss {PREFIX + name!r} cannot be used: {refusal}; choose another, as pml.ProxyAnchorLoss.")
    return _term(name)


@functools.cache
def _term(name: str) -> type[Term]:
    loss_class = _classes(_library())[name]
    options = [_option(p) for key, p in _parameters(loss_class).items() if key not in _SIZES and _plain(p)]
    own = inspect.Parameter("lr", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=float | None)
    signature = inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *options, own])

    def __init__(self: MetricLearningTerm, **given: Any) -> None:
        signature.bind(self, **given)
        MetricLearningTerm.__init__(self, **given)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    body = {
        "__init__": __init__,
        "__doc__": f"{name} of pytorch-metric-learning; see :class:`MetricLearningTerm`.",
        "__module__": __name__,
        "name": PREFIX + name,
        "loss_class": loss_class,
        "paper": f"pytorch-metric-learning {name}",
    }
    return type(name, (MetricLearningTerm,), body)


def _library() -> ModuleType:
    try:
        import pytorch_metric_learning
        from pytorch_metric_learning import losses
    except ImportError as error:
        raise UserError(
            f"losses that begin with {PREFIX!r} need pytorch-metric-learning ({error}); run "
            "pip install 'metric_kd[pml]'."
        ) from error
    version = pytorch_metric_learning.__version__
    if int(version.split(".")[0]) >= TOO_NEW:
        raise UserError(
            f"losses that begin with {PREFIX!r} need pytorch-metric-learning below {TOO_NEW}, got {version}, whose losses "
            "of the same names have other defaults; run pip install 'metric_kd[pml]'."
        )
    return losses


def _classes(library: ModuleType) -> dict[str, type[nn.Module]]:
    return {name: value for name, value in sorted(vars(library).items()) if isinstance(value, type)}


def _refusal(library: ModuleType, name: str) -> str | None:
    base = library.BaseMetricLossFunction
    loss_class = getattr(library, name)
    if name not in REFUSED and (loss_class is base or not issubclass(loss_class, base)):
        return "it is a base class"
    return REFUSED.get(name)


def _parameters(loss_class: type) -> dict[str, inspect.Parameter]:
    """What a loss's constructor takes by name, itself or through the ``**kwargs`` that it hands to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in loss_class.__mro__:
        if "__init__" not in vars(base):
            continue
        own = inspect.signature(vars(base)["__init__"]).parameters.values()
        first = not found
        for p in own:
            named = p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            # What a base asks for without default is set by the class between, save the sizes under *args.
            if named and p.name not in _OBJECTS and (first or p.default is not p.empty or p.name in _SIZES):
                found.setdefault(p.name, p)
        if all(p.kind is not p.VAR_KEYWORD for p in own):
            break
    return found


def _plain(p: inspect.Parameter) -> bool:
    return p.default is p.empty or p.default is None or isinstance(p.default, int | float | str)


def _option(p: inspect.Parameter) -> inspect.Parameter:
    """The library's parameter as one of our options, which have a default and a type."""
    kind = inspect.Parameter.KEYWORD_ONLY
    if p.default is p.empty or p.default is None:
        number = int if p.annotation is int else float
        return inspect.Parameter(p.name, kind, default=None, annotation=number | None)
    default = float(p.default) if type(p.default) is int and p.name not in _COUNTS else p.default
    return inspect.Parameter(p.name, kind, default=default, annotation=type(default))


def _given(name: str, p: inspect.Parameter, value: Any) -> Any:
    """An option's value as the library takes it. Raises ``UserError`` for one of another type."""
    option = _option(p)
    if value is None and option.default is None:
        return None
    if isinstance(option.default, str):  # triplets_per_anchor is "all" or a number
        return int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(option.default, bool):
        if not isinstance(value, bool):
            raise UserError(f"option {p.name!r} of loss {name!r} is true or false; got {value!r}.")
        return value
    number = _number(name, p.name, value)
    whole = option.annotation in (int, int | None)
    if whole and not number.is_integer():
        raise UserError(f"option {p.name!r} of loss {name!r} is a whole number; got {value!r}.")
    return int(number) if whole or (type(p.default) is int and number.is_integer()) else number


def _number(name: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"option {key!r} of loss {name!r} is a number; got {value!r}.")
    return float(value)


def _folded(name: str) -> str:
    """proxy_anchor, ProxyAnchor and proxyanchorloss are near to ProxyAnchorLoss."""
    return name.lower().replace("_", "").removesuffix("loss")


def _first_line(error: Exception) -> str:
    return (str(error).split("\n")[0] or type(error).__name__).removesuffix(".") + "."


TERMS.namespace(PREFIX, resolve)
