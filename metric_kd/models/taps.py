"""Named intermediate features of any module, read through hooks: no model is edited."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from metric_kd.errors import UserError, one_of


def layer_names(module: nn.Module) -> list[str]:
    """Every path that :class:`Taps` accepts, in the order of definition ("layer2.0.conv1")."""
    return [name for name, _ in module.named_modules() if name]


class Taps:
    """``with Taps(module, ["layer2.0.conv1"]) as taps: module(x)`` fills ``taps.values``.

    values: {path: output of that layer in its latest call, with its gradient history}; of a tuple, the first tensor.
    Inside the ``with``, layers that work in place (ReLU) work out of place, so that a tapped value is not overwritten
    by the next layer. copies: keep copies instead, and let all layers work as they do; whoever else reads the layer then
    finds what it always finds. Raises UserError for an unknown path and, when ``values`` is read, for a value that is no
    tensor or that code inside the model overwrote all the same.
    """

    def __init__(self, module: nn.Module, paths: Sequence[str], copies: bool = False):
        self.module = module
        self.copies = copies
        self.paths = tuple(paths)
        known = dict(module.named_modules())
        for path in self.paths:
            if path not in known or not path:
                raise one_of("layer", path, layer_names(module))
        self._layers = [(path, known[path]) for path in self.paths]
        self._values: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._handles: list[Any] = []
        self._in_place: list[nn.Module] = []

    @property
    def values(self) -> dict[str, Tensor]:
        for path, value in self._values.items():
            if not value.is_inference() and value._version != self._versions[path]:
                raise UserError(f"what follows layer {path!r} overwrites its output in place; tap the layer after it.")
        return self._values

    def __enter__(self) -> "Taps":
        in_place = [m for m in self.module.modules() if getattr(m, "inplace", False) is True]
        self._in_place = [] if self.copies else in_place
        for layer in self._in_place:
            layer.inplace = False  # type: ignore[assignment]
        for path, layer in self._layers:
            self._handles.append(layer.register_forward_hook(self._hook(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._in_place:
            layer.inplace = True  # type: ignore[assignment]
        self._handles, self._in_place = [], []

    def _hook(self, path: str):  # type: ignore[no-untyped-def]
        def keep(layer: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, (tuple, list)) and output else output
            if not isinstance(value, Tensor):
                raise UserError(f"layer {path!r} gives a {type(value).__name__}, no tensor; tap a layer inside it.")
            value = value.clone() if self.copies else value
            self._values[path] = value
            self._versions[path] = 0 if value.is_inference() else value._version

        return keep
