"""From the name of a backbone, with options, to the module and the facts that a network needs about it."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metric_kd.errors import UserError, one_of
from metric_kd.models import cifar, fully_connected, googlenet, inception_bn  # noqa: F401  (they fill BACKBONES)
from metric_kd.models.backbone import BACKBONES, Backbone, Resolved
from metric_kd.models.resnet import require_torchvision, torchvision_backbone, torchvision_names
from metric_kd.types import Output


def backbone_names() -> list[str]:
    """Every name that ``--base`` takes: ours, then torchvision's classification networks where it is installed.

    A width factor (``resnet20_x0.5``), other wide ResNets (``wrn_28_10``) and options (``resnet8:stem_stride=2``) come
    on top.
    """
    ours = list(BACKBONES)
    return ours + [name for name in torchvision_names() if name not in BACKBONES]


def parse_base(base: str) -> tuple[str, dict[str, Any]]:
    """``"resnet8_x2:stem_stride=2"`` as ``("resnet8", {"width": 2.0, "stem_stride": 2})``.

    The form is ``name[_xWIDTH][:option=value,...]``. Raises UserError for an unknown name or option, and for a value
    that does not fit its option.
    """
    name, colon, rest = base.partition(":")
    name, given = _known_name(name)
    factory = _factory(name)
    known = {} if factory is None else _options(factory)
    if colon and not rest:
        raise UserError(f"backbone {base!r} ends in a colon; write name:option=value, or the name alone.")
    for part in rest.split(",") if rest else []:
        key, equals, text = part.partition("=")
        if not equals:
            raise UserError(f"option {part!r} of backbone {name} has no value; write {part}=value.")
        if not known:
            raise UserError(f"backbone {name} takes no options; leave out {part!r}.")
        if key not in known:
            raise one_of(f"option of backbone {name}", key, list(known))
        if key in given:
            raise UserError(f"option {key!r} of backbone {name} is given twice; give it once.")
        given[key] = _value(name, key, text, known[key])
    return name, given


def check_base(base: str, input_size: int | None = None) -> int:
    """The input size in px that :func:`resolve` would settle on; raises UserError where it would.

    Costs no memory and draws no random numbers.
    """
    try:
        with torch.device("meta"):
            return resolve(base, input_size).input_size
    except NotImplementedError:  # torchvision's RegNets read values while they are built, and meta tensors have none
        with torch.random.fork_rng():
            return resolve(base, input_size).input_size


def resolve(base: str, input_size: int | None = None) -> Resolved:
    """Build the backbone that ``base`` names, for images of ``input_size`` px (None: its own test size).

    Raises UserError as :func:`parse_base` does, and for an input size that the backbone refuses.
    """
    if input_size is not None and input_size < 1:
        raise UserError(f"an input size of {input_size} px is not possible; choose 1 or more.")
    name, options = parse_base(base)
    factory = _factory(name)
    if factory is None:
        return torchvision_backbone(name, input_size)
    module = factory(**options)
    return Resolved(
        module=module,
        read=_call,
        pooled_size=module.pooled_size,
        input_size=input_size or module.input_size,
        pixels=module.pixels,
        provides=module.provides,
        heads=("fc.", "linear.", "classifier.", "last_linear."),
    )


def _call(module: nn.Module, images: Tensor, want: tuple[str, ...]) -> Output:
    return module(images, want)


def _known_name(name: str) -> tuple[str, dict[str, Any]]:
    """The name without its width suffix, and the width as an option."""
    if _factory(name) is not None:
        return name, {}
    width = re.fullmatch(r"(.+)_x(\d+\.?\d*)", name)
    if width and width[1] in BACKBONES and _options(BACKBONES[width[1]]).get("width") is float:
        return width[1], {"width": float(width[2])}
    if not torchvision_names():
        require_torchvision(name)
    if name not in torchvision_names():
        raise one_of("backbone", name, backbone_names())
    return name, {}


def _factory(name: str) -> Callable[..., Backbone] | None:
    """The factory of one of our backbones, or None."""
    wide = re.fullmatch(r"wrn_(\d+)_(\d+)", name)
    if name in BACKBONES:
        return BACKBONES[name]
    return partial(cifar.WideResNet, int(wide[1]), int(wide[2])) if wide else None


def _options(factory: Callable[..., Backbone]) -> dict[str, Any]:
    """Option name -> its type, from the factory's keywords with defaults."""
    parameters = inspect.signature(factory).parameters.values()
    return {
        p.name: type(p.default) if p.annotation is p.empty else p.annotation
        for p in parameters
        if p.default is not p.empty
    }


def _value(name: str, key: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        words = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, f"a {kind.__name__}")
        raise UserError(f"option {key} of backbone {name} takes {words}, not {text!r}; mend it.") from None
