"""What distillation taught a network: information discarding, concepts, and how they were learned.

Cheng, Rao, Chen, Zhang: Explaining Knowledge Distillation by Quantifying the Knowledge, CVPR 2020, arXiv 2003.03622.
"""

from metric_kd.quantify.concepts import (
    count_concepts,
    cumulative_distance,
    effective,
    find_concepts,
    learning_simultaneity,
    stability,
)
from metric_kd.quantify.discarding import Discarding, entropy, information_discarding
from metric_kd.quantify.masks import Boxes, MaskFolder, box_mask, central_box, segmentation_mask
from metric_kd.quantify.search import Search

__all__ = [
    "Boxes",
    "Discarding",
    "MaskFolder",
    "Search",
    "box_mask",
    "central_box",
    "count_concepts",
    "cumulative_distance",
    "effective",
    "entropy",
    "find_concepts",
    "information_discarding",
    "learning_simultaneity",
    "segmentation_mask",
    "stability",
]
