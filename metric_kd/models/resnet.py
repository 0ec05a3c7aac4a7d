"""Any classification network of torchvision by name: the module itself, without its last layer, with stage maps."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from metric_kd.errors import UserError
from metric_kd.models.backbone import Pixels, Resolved
from metric_kd.types import Output

STAGES: dict[str, tuple[str, ...]] = {
    "layer4": ("maxpool", "layer1", "layer2", "layer3", "layer4"),
    "stage4": ("maxpool", "stage2", "stage3", "stage4"),
    "trunk_output": ("stem", *(f"trunk_output.block{i}" for i in (1, 2, 3, 4))),
    "blocks": ("stem", *(f"blocks.{i}" for i in (0, 1, 2, 3))),
    "Mixed_7c": ("maxpool1", "maxpool2", "Mixed_5d", "Mixed_6e", "Mixed_7c"),
}
"""A child that marks the family (ResNet, ShuffleNet, RegNet, MaxViT, Inception) -> paths of stem and stages."""


@cache
def torchvision_names() -> tuple[str, ...]:
    """torchvision's classification networks; none where it is not installed."""
    try:
        from torchvision import models
    except ImportError:
        return ()
    return tuple(models.list_models(module=models))


def require_torchvision(name: str) -> None:
    """Raise UserError, naming the backbone that cannot be looked up, where torchvision is missing."""
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"backbone {name!r} is none of ours and torchvision cannot be imported ({error}); install torchvision."
        ) from None


def torchvision_backbone(name: str, input_size: int | None) -> Resolved:
    """``name`` without its classifier; keys stay torchvision's ("conv1.weight", "layer1.0.conv1.weight").

    pooled is the input of the removed last layer (of VGG the 4096 features before it). Maps: for a ResNet, the stem
    after its max pooling, then ``layer1`` to ``layer4``; for most other convolutional networks the stem and the last
    layer at each resolution, the last five of these; for a ViT its tokens after the position embedding and after each
    quarter of the layers, as (N, C, h, w) without the class token. Raises UserError for an input size that the
    architecture refuses.
    """
    size = input_size or (299 if name == "inception_v3" else 224)
    module = _build(name, size)
    path, pooled_size = _behead(module)
    stages = _stages(module, name, size)
    return Resolved(
        module=module,
        read=partial(read_stages, stages=stages, layout=_layout(module)),
        pooled_size=pooled_size,
        input_size=size,
        pixels=Pixels(),
        provides=frozenset({"pooled", "maps"} if stages else {"pooled"}),
        heads=(f"{path}.", "AuxLogits."),
    )


def read_stages(
    module: nn.Module, images: Tensor, want: tuple[str, ...], stages: tuple[str, ...], layout: str
) -> Output:
    """The module's own forward, with hooks on its stages where maps are wanted.

    A layer that a later in-place ReLU overwrites is read as that ReLU leaves it, which is what a map means.
    """
    if "maps" not in want:
        return Output(pooled=module(images).flatten(1))
    kept: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda layer, args, output: kept.__setitem__(path, output)

    handles = [module.get_submodule(path).register_forward_hook(keep(path)) for path in stages]
    try:
        pooled = module(images).flatten(1)
    finally:
        for handle in handles:
            handle.remove()
    return Output(maps=tuple(_as_map(kept[path], layout) for path in stages), pooled=pooled)


def _as_map(features: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return features.permute(0, 3, 1, 2)
    if layout == "tokens":
        side = int((features.shape[1] - 1) ** 0.5)
        return features[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    return features


def _layout(module: nn.Module) -> str:
    return {"SwinTransformer": "channels_last", "VisionTransformer": "tokens"}.get(type(module).__name__, "maps")


def _build(name: str, size: int) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {}
    if name == "inception_v3":
        # Its published weights expect pixels in -1..1; transform_input takes ours there.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        if size % patch:
            raise UserError(f"{name} takes a multiple of {patch} px, not {size}; choose another input size.")
        options = {"image_size": size}
    elif name.startswith("maxvit"):
        options = {"input_size": (size, size)}
    try:
        return models.get_model(name, weights=None, **options)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} cannot be built for {size} px ({reason}); choose another input size.") from None


def _behead(module: nn.Module) -> tuple[str, int]:
    """Replace the last layer by Identity; its path and its number of inputs."""
    for attribute in ("fc", "classifier", "head", "heads"):
        head = getattr(module, attribute, None)
        if head is None:
            continue
        found = [(p, m) for p, m in head.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        inner, last = found[-1]
        path = f"{attribute}.{inner}" if inner else attribute
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Identity())
        return path, last.in_features if isinstance(last, nn.Linear) else last.in_channels
    raise UserError(
        f"torchvision's {type(module).__name__} has no classifier that can be removed; choose another backbone."
    )


def _stages(module: nn.Module, name: str, size: int) -> tuple[str, ...]:
    """Paths of the layers whose outputs are the maps."""
    if _layout(module) == "tokens":
        layers = [f"encoder.layers.{child}" for child, _ in module.get_submodule("encoder.layers").named_children()]
        quarter = len(layers) // 4
        return ("encoder.dropout", *(layers[i * quarter - 1] for i in (1, 2, 3)), "encoder.ln")
    for mark, paths in STAGES.items():
        if hasattr(module, mark):
            return paths
    body = "features" if hasattr(module, "features") else "layers"
    return _last_of_each_resolution(name, size, body)


@cache
def _last_of_each_resolution(name: str, size: int, body: str) -> tuple[str, ...]:
    """First child and last child at each resolution of a sequential network, the last five of them.

    Found by one forward on the meta device, which computes shapes only.
    """
    with torch.device("meta"):
        module = _build(name, size).eval()
    sides: dict[str, int] = {}

    def keep(path: str) -> Any:
        return lambda layer, args, output: sides.__setitem__(path, output.shape[1 if swin else 2])

    swin = _layout(module) == "channels_last"
    for child, layer in module.get_submodule(body).named_children():
        layer.register_forward_hook(keep(f"{body}.{child}"))
    try:
        with torch.no_grad():
            module(torch.empty(1, 3, size, size, device="meta"))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} cannot take images of {size} px ({reason}); choose a larger input size.") from None
    last = {side: path for path, side in sides.items()}
    paths = dict.fromkeys([next(iter(sides)), *last.values()])
    return tuple(paths)[-5:]
