"""--also_eval DATASET[:DATA]: what the student finds on the test images of other data sets, which it was not made for."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from metric_kd.cli.config import GranularityConfig, RunConfig
from metric_kd.cli.goals import Retrieval
from metric_kd.data import DATASETS, load_dataset
from metric_kd.data.loading import ImageLoader
from metric_kd.data.transforms import Geometry
from metric_kd.errors import UserError
from metric_kd.evaluation.retrieval import check_ks, gallery_size

Elsewhere = dict[str, dict[str, float]]
"""Entry of --also_eval -> {"recall@K": fraction}."""


def refusals(config: RunConfig) -> list[str]:
    """What is wrong with --also_eval, one sentence each."""
    if not config.also_eval:
        return []
    if config.task == "classification" or isinstance(config, GranularityConfig):
        return [
            "--also_eval measures embeddings by Recall@K; leave it out here, or see metric-kd probe for classifiers."
        ]
    sentences = []
    for entry in config.also_eval:
        try:
            DATASETS.canonical(entry.partition(":")[0])
        except UserError as error:
            sentences.append(f"--also_eval {entry}: {error}")
    if len(set(config.also_eval)) < len(config.also_eval):
        sentences.append("--also_eval names a data set twice; name each once.")
    return sentences


def loaders_of(config: RunConfig) -> dict[str, ImageLoader]:
    """Entry -> its test images at the student's size. Raises ``UserError`` where they are missing or too few for a K."""
    loaders = {}
    for entry in config.also_eval:
        name, _, data = entry.partition(":")
        try:
            records = load_dataset(name, data or config.data).test
            check_ks(config.recall, gallery_size(len(records), records.query, records.gallery))
        except UserError as error:
            raise UserError(f"--also_eval {entry}: {error}") from error
        assert config.input_size is not None
        geometry = Geometry(input_size=config.input_size, flip=False)
        loaders[entry] = ImageLoader(
            records, geometry, seed=config.seed, workers=config.workers, skip_unreadable=config.skip_unreadable
        )
    return loaders


def measured(
    config: RunConfig, device: torch.device, loaders: Mapping[str, ImageLoader], student: nn.Module
) -> Elsewhere:
    """Recall@K of the student on each; all processes call it together, the main one gets the values."""
    plain, found = replace(config, metrics=[], nested=None), {}
    for entry, loader in loaders.items():
        values = Retrieval().evaluate(plain, device, loader)(student)
        found[entry] = {key: value for key, value in values.items() if key.startswith("recall@")}
    return found


def lines_of(elsewhere: Elsewhere) -> list[str]:
    """A line for people of every value."""
    return [
        f"Recall@{key.removeprefix('recall@')} on {entry}: {100 * value:.4f}"
        for entry, values in elsewhere.items()
        for key, value in values.items()
    ]
