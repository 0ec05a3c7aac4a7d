"""The stage of its own in which a method prepares the student before it learns the task."""

from metric_kd.errors import UserError
from metric_kd.losses.term import Stage


def initialising_stage(name: str, epochs: int = 0) -> Stage:
    """A quarter of the run at a tenth of its rate, falling at 60 % and 80 % of the stage: the KD Zoo's 30, 10 and 10
    epochs of 200 for FSP and AB. ``epochs``: its length, 0 for the quarter. Raises ``UserError`` below 0.
    """
    return Stage(name, share=0.25, epochs=stage_length(name, epochs), lr=0.1, milestones=(0.6, 0.8))


def stage_length(name: str, epochs: int) -> int:
    """The option ``stage_epochs``, checked."""
    if epochs < 0:
        raise UserError(
            f"stage_epochs={epochs} of {name} is no length; give the epochs of its own stage, 0 for a share."
        )
    return epochs
