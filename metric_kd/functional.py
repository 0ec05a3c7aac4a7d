"""Every loss as a pure function of tensors, student first: ``import metric_kd.functional as KD``."""

from metric_kd.distill.feature.ab import ab
from metric_kd.distill.feature.afd import afd
from metric_kd.distill.feature.at import at
from metric_kd.distill.feature.fitnet import fitnet
from metric_kd.distill.feature.fsp import fsp
from metric_kd.distill.feature.ft import ft
from metric_kd.distill.feature.imitate import imitate
from metric_kd.distill.feature.kdsvd import kdsvd
from metric_kd.distill.feature.lwm import lwm
from metric_kd.distill.feature.nst import nst
from metric_kd.distill.feature.ofd import bn_margin, ofd, ofd_margin
from metric_kd.distill.feature.regression import regression
from metric_kd.distill.feature.vid import vid
from metric_kd.distill.granularity import granularity, stable_logits
from metric_kd.distill.logit.bss import bss
from metric_kd.distill.logit.dml import dml
from metric_kd.distill.logit.logits import logits
from metric_kd.distill.logit.sobolev import sobolev
from metric_kd.distill.logit.st import st
from metric_kd.distill.relational.cc import cc
from metric_kd.distill.relational.crd import crd
from metric_kd.distill.relational.csd import csd
from metric_kd.distill.relational.dark_rank import dark_rank
from metric_kd.distill.relational.irg import irg_edge, irg_transformation, irg_vertex
from metric_kd.distill.relational.pkt import pkt
from metric_kd.distill.relational.rkd_angle import rkd_angle
from metric_kd.distill.relational.rkd_distance import rkd_distance
from metric_kd.distill.relational.sp import sp
from metric_kd.losses.contrastive import contrastive
from metric_kd.losses.cross_entropy import cross_entropy
from metric_kd.losses.triplet import l1_triplet, l2_triplet

__all__ = [
    "ab",
    "afd",
    "at",
    "bn_margin",
    "bss",
    "cc",
    "contrastive",
    "crd",
    "cross_entropy",
    "csd",
    "dark_rank",
    "dml",
    "fitnet",
    "fsp",
    "ft",
    "granularity",
    "imitate",
    "irg_edge",
    "irg_transformation",
    "irg_vertex",
    "kdsvd",
    "l1_triplet",
    "l2_triplet",
    "logits",
    "lwm",
    "nst",
    "ofd",
    "ofd_margin",
    "pkt",
    "regression",
    "rkd_angle",
    "rkd_distance",
    "sobolev",
    "sp",
    "st",
    "stable_logits",
    "vid",
]
