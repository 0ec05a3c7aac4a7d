"""Layers by name: where a network has them, their features of images, their weights, and what runs up to them.

A layer is named as a field of :class:`~metric_kd.types.Output` ("pooled", "embedding", "logits"), as a paper names it
("fc1", where the backbone says which of its modules that is; there "fc3" is the logits), as "conv", the last stage of any
other network (before its ReLU where the network tells), or as the path of any module ("base.layer3.0.conv1"). A module's
feature is its output as it is, before any activation that follows.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metric_kd.errors import UserError, one_of
from metric_kd.models.taps import Taps, layer_names
from metric_kd.modes import eval_mode
from metric_kd.types import Output

LAYER = "layer:"
"""Beginning of an entry of ``want``; the name of a layer follows, under which ``Output.taps`` then holds its feature."""
FIELDS = ("pooled", "embedding", "logits")
SHORTCUTS = {"downsample", "shortcut"}
"""What our backbones and torchvision's call the branch around a residual block."""


class Layer(NamedTuple):
    """Where a feature is: in a field of ``Output`` (its last entry where it has several), or behind the module at a path."""

    name: str
    field: str = ""
    path: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of ``Output`` that must be wanted so that the layer runs."""
        return (self.field or {"linear": "embedding", "classifier": "logits"}.get(self.path.split(".")[0], "pooled"),)

    def feature(self, output: "Output | None", taps: Taps) -> Tensor:
        """Its feature in what the network gave and what the hooks kept."""
        if self.path:
            if self.path not in taps.values:
                raise UserError(f"layer {self.name!r} is never called as a whole; choose a layer inside it.")
            return taps.values[self.path]
        value = getattr(output, self.field)
        feature: Tensor = value[-1] if isinstance(value, tuple) else value
        return feature


def find_layer(network: nn.Module, name: str) -> Layer:
    """The layer that a name means in this network; ``UserError``, with the nearest name, where there is none.

    network: a :class:`~metric_kd.models.network.Network`, or any module, whose layers are paths alone.
    """
    provides = _provides(network)
    paper, prefix = _paper(network)
    wanted = "logits" if name == "fc3" and paper else name
    if wanted in FIELDS and wanted in provides:
        return Layer(name, field=wanted)
    if wanted == "logits" and provides:
        raise UserError(f"the network tells no classes apart, so it has no layer {name!r}; choose another layer.")
    if name in paper:
        return Layer(name, path=f"{prefix}{paper[name]}")
    if name == "conv":
        for field in ("preacts", "maps"):
            if field in provides:
                return Layer(name, field=field)
    paths = layer_names(network)
    if name in paths:
        return Layer(name, path=name)
    short = [*(field for field in FIELDS if field in provides), *paper, *(["fc3"] if paper else [])]
    short += ["conv"] if "conv" not in short and {"preacts", "maps"} & provides else []
    raise one_of("layer", name, [*(short or paths), *difflib.get_close_matches(name, paths, n=1, cutoff=0.5)])


def layers_in(network: nn.Module, want: Iterable[str]) -> dict[str, Layer]:
    """Name -> layer of the entries "layer:NAME"; ``UserError`` for one that the network does not have."""
    names = [entry.removeprefix(LAYER) for entry in want if entry.startswith(LAYER)]
    return {name: find_layer(network, name) for name in names}


def output_with_layers(network: nn.Module, images: Tensor, want: tuple[str, ...]) -> Output:
    """What is wanted of a network, features of layers included, in one pass."""
    layers = layers_in(network, want)
    plain = [entry for entry in want if not entry.startswith(LAYER)]
    asked = dict.fromkeys([*plain, *(field for layer in layers.values() for field in layer.fields)])
    # Copies: what other terms read of the network must not depend on whether a layer is tapped.
    with Taps(network, [layer.path for layer in layers.values() if layer.path], copies=True) as taps:
        output: Output = network.forward(images, want=tuple(asked))
        features = {name: layer.feature(output, taps) for name, layer in layers.items()}
    unasked = {field: None for field in asked if field not in plain}
    return output._replace(**unasked, taps=features)


@contextmanager
def reading(network: nn.Module, name: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """``with reading(network, "fc1") as read: feature = read(images)``: (N, ...) features of a layer, with gradients.

    One forward pass each, in the mode that the network is in. images: 0..255 for a
    :class:`~metric_kd.models.network.Network`, which normalises them; for any other module its own input. Raises
    ``UserError`` for an unknown layer at once, and for one that the pass never calls.
    """
    layer = find_layer(network, name)
    ours = bool(_provides(network))
    with Taps(network, [layer.path] if layer.path else [], copies=True) as taps:

        def read(images: Tensor) -> Tensor:
            output = network(images, want=layer.fields) if ours else network(images)
            return layer.feature(output, taps)

        yield read


def weight_of(network: nn.Module, name: str) -> str:
    """Name of the layer's weights: the last parameter of two or more dimensions up to and including the layer, in the
    order in which modules are defined.

    The weights of a residual block's shortcut are passed over. Of "pooled" the last of the backbone; of "embedding" those
    of the embedding's own layer, or the last of the backbone; of "logits" the classifier's; of "conv", where no module is
    named so, the last convolution's.
    """
    layer = find_layer(network, name)
    modules = list(network.named_modules())
    names = {path for path, _ in modules}
    end = layer.path or {"embedding": "linear", "logits": "classifier"}.get(layer.field, "base")
    if end not in names:  # the embedding is the pooled feature; a backbone on its own
        end = "base" if "base" in names else ""
    last = max(i for i, (path, _) in enumerate(modules) if end in ("", path) or path.startswith(f"{end}."))
    least = 3 if layer.field in ("preacts", "maps") else 2
    weights = [
        f"{path}.{key}" if path else key
        for path, module in modules[: last + 1]
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= least and not (SHORTCUTS & set(path.split(".")) - set(end.split(".")))
    ]
    if not weights:
        raise UserError(f"no weights come before layer {name!r}; choose a later layer.")
    return weights[-1]


class UpTo(NamedTuple):
    """What a layer's feature depends on: names of parameters, and of modules that run on the way."""

    parameters: frozenset[str]
    modules: frozenset[str]


def running_up_to(network: nn.Module, name: str, images: Tensor) -> UpTo:
    """What runs up to a layer, found in the graph of its feature of example images; the network is left as it was.

    A module that is called several times counts where any of its calls does.
    """
    asking = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    calls: list[tuple[str, object]] = []
    handles = [module.register_forward_hook(_noting(path, calls)) for path, module in network.named_modules() if path]
    try:
        network.requires_grad_(True)
        with eval_mode(network), torch.enable_grad(), reading(network, name) as read:
            nodes = _graph(read(images.detach().float().requires_grad_()))
    finally:
        for handle in handles:
            handle.remove()
        for parameter, asked in asking:
            parameter.requires_grad_(asked)
    leaves = {id(node.variable) for node in nodes if hasattr(node, "variable")}
    parameters = frozenset(key for key, parameter in network.named_parameters() if id(parameter) in leaves)
    return UpTo(parameters, frozenset(path for path, node in calls if node in nodes))


def _noting(path: str, calls: list[tuple[str, object]]):  # type: ignore[no-untyped-def]
    """A hook that notes which nodes of the graph a module's output is.

    The output is copied, so that a module which hands its input on (dropout in eval mode) has a node of its own.
    """

    def note(module: nn.Module, args: object, output: object) -> object:
        copied = output.clone() if isinstance(output, Tensor) else output
        for value in copied if isinstance(copied, tuple | list) else (copied,):
            if isinstance(value, Tensor):
                calls.append((path, value.grad_fn))
        return copied

    return note


def _graph(feature: Tensor) -> set:  # type: ignore[type-arg]
    """All nodes of the autograd graph behind a tensor."""
    found, todo = set(), [feature.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [behind for behind, _ in node.next_functions]
    return found


def _provides(network: nn.Module) -> frozenset[str]:
    """Fields of ``Output`` that a network of this project gives; nothing for other modules."""
    found = getattr(network, "provides", None)
    return found if isinstance(found, frozenset) else frozenset()


def _paper(network: nn.Module) -> tuple[Mapping[str, str], str]:
    """The paper's names of layers in a network's backbone, and what their paths begin with."""
    base = getattr(network, "base", None)
    prefix = "base." if isinstance(base, nn.Module) else ""
    layers = getattr(base if prefix else network, "layers", None)
    return (layers if isinstance(layers, Mapping) else {}), prefix
