"""What makes up a step: --batch, --accumulate, --relation_batch, --compile, --log_gradients, and what they do not go with."""

from metric_kd.cli.config import DistillConfig, GranularityConfig, RunConfig, is_evaluation
from metric_kd.cli.losses import losses_of
from metric_kd.engine.replay import check_replay
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective
from metric_kd.losses.term import TERMS


def refusals(config: RunConfig) -> list[str]:
    """What is wrong with the flags that say what a step is, one sentence each."""
    return [*_relation_batch(config), *_compile(config), *_log_gradients(config)]


def _relation_batch(config: RunConfig) -> list[str]:
    whole = config.relation_batch
    if whole is None or whole < 1 or config.batch < 1:
        return []
    sentences = []
    if whole % config.batch:
        sentences.append(
            f"--relation_batch {whole} is taken --batch {config.batch} images at a time; make it a multiple of --batch."
        )
    if config.accumulate > 1:
        sentences.append("--relation_batch and --accumulate both make a step of several passes; leave one of them out.")
    if isinstance(config, GranularityConfig) or (isinstance(config, DistillConfig) and config.mutual):
        return [*sentences, "--relation_batch trains one student by what its losses relate; leave it out here."]
    try:
        if not is_evaluation(config):
            check_replay(Objective(losses_of(config)))
    except UserError as error:
        sentences.append(str(error))
    return sentences


def _compile(config: RunConfig) -> list[str]:
    if not config.compile or is_evaluation(config) or isinstance(config, GranularityConfig):
        return []
    return [
        f"loss {loss.name!r} takes gradients of gradients, which compiled networks do not have; leave it or --compile out."
        for loss in losses_of(config)
        if loss.weight and TERMS[loss.name].differentiates
    ]


def _log_gradients(config: RunConfig) -> list[str]:
    if config.log_gradients < 0:
        return [f"--log_gradients is {config.log_gradients}; give a number of steps, or 0 for none."]
    alone = not isinstance(config, GranularityConfig) and not (isinstance(config, DistillConfig) and config.mutual)
    if config.log_gradients and not alone:
        return ["--log_gradients measures the losses of one student; leave it out here."]
    return []
