"""Trained layers that give the student's features the teacher's width, where a method compares them element by element."""

from torch import Tensor, nn

from metric_kd.models.cifar import initialise


def connector(student: Tensor, teacher: Tensor, *, always: bool = False, norm: bool = True) -> nn.Module:
    """From the student's width to the teacher's, on the student's device; identity where they agree.

    Maps (N, C, H, W): 1x1 convolution without bias and, with ``norm``, batch normalisation, no activation; rows (N, D):
    a linear layer without bias. ``always``: a layer even where the widths agree. Grids are not changed: pool first
    (:func:`~metric_kd.distill.layers.pool_to_smaller`).
    """
    ours, theirs = student.shape[1], teacher.shape[1]
    if ours == theirs and not always:
        return nn.Identity()
    layer: nn.Module
    if student.ndim == 4:
        layer = nn.Sequential(nn.Conv2d(ours, theirs, 1, bias=False), *([nn.BatchNorm2d(theirs)] if norm else []))
    else:
        layer = nn.Linear(ours, theirs, bias=False)
    initialise(layer)
    return layer.to(student.device)
