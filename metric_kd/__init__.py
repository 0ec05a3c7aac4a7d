"""metric_kd: train embedding networks, distil them into small ones, and measure what retrieval kept.

``metric_kd.functional`` holds every loss as a pure function; ``metric_kd.load(run).embed(images)`` gives vectors.
"""

from typing import TYPE_CHECKING, Any

from metric_kd.errors import UserError

if TYPE_CHECKING:
    from metric_kd.deploy.embedder import load

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from metric_kd.deploy.embedder import load

        return load
    raise AttributeError(f"module 'metric_kd' has no attribute {name!r}")
