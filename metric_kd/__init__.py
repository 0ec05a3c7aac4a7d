"""metric_kd: train embedding networks, distil them into small ones, and measure what retrieval kept.

``metric_kd.functional`` holds every loss as a pure function; ``metric_kd.load(run).embed(images)`` gives vectors;
``metric_kd.Searcher(file).search(images)`` finds the nearest images of an index.
"""

from typing import TYPE_CHECKING, Any

from metric_kd.errors import UserError
from metric_kd.version import __version__

if TYPE_CHECKING:
    from metric_kd.deploy.embedder import load
    from metric_kd.deploy.searcher import Searcher

__all__ = ["Searcher", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from metric_kd.deploy.embedder import load

        return load
    if name == "Searcher":
        from metric_kd.deploy.searcher import Searcher

        return Searcher
    raise AttributeError(f"module 'metric_kd' has no attribute {name!r}")
