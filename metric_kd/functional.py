"""Every loss as a pure function of tensors, student first: ``import metric_kd.functional as KD``."""

from metric_kd.distill.feature.at import at
from metric_kd.distill.feature.fitnet import fitnet
from metric_kd.distill.relational.dark_rank import dark_rank
from metric_kd.distill.relational.rkd_angle import rkd_angle
from metric_kd.distill.relational.rkd_distance import rkd_distance
from metric_kd.losses.contrastive import contrastive
from metric_kd.losses.cross_entropy import cross_entropy
from metric_kd.losses.triplet import l1_triplet, l2_triplet

__all__ = [
    "at",
    "contrastive",
    "cross_entropy",
    "dark_rank",
    "fitnet",
    "l1_triplet",
    "l2_triplet",
    "rkd_angle",
    "rkd_distance",
]
