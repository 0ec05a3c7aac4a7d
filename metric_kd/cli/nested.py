"""--nested 16,32,64: losses and Recall@K of prefixes of the student's embedding."""

from collections.abc import Mapping

from torch import nn

from metric_kd.cli.config import DistillConfig, GranularityConfig, RunConfig
from metric_kd.errors import UserError
from metric_kd.evaluation.embed import Embeddings
from metric_kd.losses.nested import prefix
from metric_kd.models.network import Network

BYTES = 4
"""Of a number in float32."""


def prefixes_of(config: RunConfig) -> tuple[int, ...]:
    """The lengths of the prefixes, ascending, without the whole embedding. Raises ``UserError`` for what is no length."""
    if config.nested is None:
        return ()
    try:
        lengths = {int(part) for part in config.nested.split(",")}
    except ValueError:
        lengths = {0}
    if min(lengths) < 1:
        raise UserError(f"--nested {config.nested!r} is no list of lengths; write whole numbers as in 16,32,64.")
    return tuple(sorted(lengths - {config.embedding_size}))


def refusals(config: RunConfig) -> list[str]:
    """What is wrong with --nested, and what it does not go with, one sentence each."""
    if config.nested is None:
        return []
    try:
        lengths = prefixes_of(config)
    except UserError as error:
        return [str(error)]
    if config.task == "classification" or isinstance(config, GranularityConfig):
        return ["--nested is of embeddings that retrieve; leave it out here."]
    sentences = []
    if isinstance(config, DistillConfig):
        given = {"mutual": config.mutual, "unlabelled": config.unlabelled, "imitate": config.imitate is not None}
        given["eval asymmetric"] = config.eval == "asymmetric"
        sentences += [f"--nested does not go with --{flag}; leave one of them out." for flag, on in given.items() if on]
    if config.embedding_size and lengths and max(lengths) > config.embedding_size:
        sentences.append(
            f"--nested {max(lengths)} is longer than --embedding_size {config.embedding_size}; shorten it."
        )
    return sentences


def key_of(metric: str, length: int) -> str:
    """``recall@1[:32]``: the metric of the first 32 numbers."""
    return f"{metric}[:{length}]"


def nested_keys(config: RunConfig) -> dict[str, str]:
    """Metric of a prefix -> its name for people."""
    return {
        key_of(f"recall@{k}", length): f"Recall@{k} of the first {length} numbers"
        for length in prefixes_of(config)
        for k in config.recall
    }


def prefix_of(config: RunConfig, vectors: Embeddings, length: int) -> Embeddings:
    """The embeddings' first numbers, as the losses have seen them."""
    return vectors._replace(vectors=prefix(vectors.vectors, length, config.l2normalize))


def check_width(config: RunConfig, network: Network) -> None:
    """Raise ``UserError`` for prefixes that are not shorter than the network's embedding."""
    lengths = prefixes_of(config)
    if lengths and max(lengths) >= network.embedding_size:
        raise UserError(
            f"--nested {max(lengths)} is no shorter than the embedding, of {network.embedding_size} numbers, which is always "
            "taken whole as well; give shorter prefixes."
        )


def prefix_table(config: RunConfig, student: nn.Module, metrics: Mapping[str, float]) -> list[str]:
    """Lines: dimensions, bytes of a vector in float32, and Recall@K in percent; none without --nested."""
    if not prefixes_of(config):
        return []
    assert isinstance(student, Network)
    width = student.embedding_size
    names = [f"recall@{k}" for k in config.recall]
    rows = [["dimensions", "bytes", *(f"Recall@{k}" for k in config.recall)]]
    for length in (*prefixes_of(config), width):
        found = [metrics[name if length == width else key_of(name, length)] for name in names]
        rows.append([str(length), str(BYTES * length), *(f"{100 * value:.2f}" for value in found)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(size) for cell, size in zip(row, widths, strict=True)) for row in rows]
