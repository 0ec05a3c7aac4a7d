"""Lineage: which network this is, of which teacher it is the student, and whether the two share a space."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from metric_kd.deploy.bridge import Bridge
from metric_kd.engine.reproducibility import weights_digest
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective
from metric_kd.losses.spec import parse_loss
from metric_kd.models.network import Network


class Lineage(NamedTuple):
    """teacher: digest of its weights, empty where there is none or none is known; shared: whether the vectors lie in its
    space, through a bridge or by a loss that ties them to it."""

    teacher: str = ""
    shared: bool = False

    def described(self) -> dict[str, str]:
        """For an exported file's description of itself; :meth:`from_description` reads it."""
        return {"teacher": self.teacher, "shares_space": str(self.shared).lower()}

    @classmethod
    def from_description(cls, description: Mapping[str, str]) -> "Lineage":
        return cls(description.get("teacher", ""), description.get("shares_space") == "true")


def identity(network: Network, bridge: Bridge | None = None) -> str:
    """Digest of what gives the vectors: description, weights, and the bridge that they go through."""
    parts = [json.dumps(network.spec.to_dict(), sort_keys=True), weights_digest(network)]
    if bridge is not None:
        tensors = (bridge.weight, bridge.mean, bridge.shift)
        parts += [hashlib.sha256(part.cpu().contiguous().numpy().tobytes()).hexdigest() for part in tensors]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def lineage_of(checkpoint: Path, bridged: bool) -> Lineage:
    """Of a checkpoint in a run's directory; bridged: whether its vectors go through its bridge."""
    run = RunDirectory(checkpoint.parent)
    if not run.card.is_file():
        return Lineage()
    card = run.card_content()
    teacher = card.get("environment", {}).get("teacher")
    return Lineage(teacher or "", bool(teacher) and (bridged or _ties(card.get("losses") or [])))


def _ties(losses: list[str]) -> bool:
    try:
        terms = dict(Objective([parse_loss(loss) for loss in losses]).items()).values()
    except UserError:  # a loss of a plugin, which is not loaded here
        return False
    return any(term.anchors for term in terms)
