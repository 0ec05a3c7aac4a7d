"""A linear probe: what a frozen backbone's pooled feature tells of other classes."""

from dataclasses import replace

from metric_kd.engine.tasks import Solo
from metric_kd.losses.objective import Objective
from metric_kd.models.network import Network, build_network


def probed(network: Network, classes: int) -> Network:
    """The same backbone, frozen, under a fresh classifier (torch's global generator) of its pooled feature."""
    spec = replace(network.spec, embedding_size=0, l2normalize=False, num_classes=classes)
    probe = build_network(spec)
    probe.base.load_state_dict(network.base.state_dict())
    probe.base.requires_grad_(False)
    return probe


class Probe(Solo):
    """Train the classifier of a :func:`probed` network alone.

    The network stays in eval mode, so that no statistics move, and no gradient enters the backbone: its parameters ask for
    none, and so its activations are not kept either.
    """

    def __init__(self, network: Network, objective: Objective, precision: str = "fp32"):
        super().__init__(network, None, objective, precision)

    def train(self, mode: bool = True) -> "Probe":
        super().train(mode)
        self.student.eval()
        return self
