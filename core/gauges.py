"""What the training loop measures besides its losses: a row of `GAUGES` each.

A gauge reads and changes nothing. It is asked wherever a line is printed (log_interval), by the rank that writes, so it
must not wait for other ranks. Its numbers go to metrics.jsonl and to W&B as train/<name>.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from core.objective import Losses
from core.stages import Stage
from core.training_step import TrainingState


class Moment(NamedTuple):
    """A training step that was just made. iteration: its number; state: with the weights after it; stage: the heads that
    trained; losses: of the step."""

    iteration: int
    state: TrainingState
    stage: Stage
    losses: Losses


Gauge = Callable[[Moment], Mapping[str, float]]


def gradient_norms(moment: Moment) -> dict[str, float]:
    """Of the trunk and of each head that trains, before clipping."""
    norms = moment.state.gradient_norms
    return {'grad_norm': norms['main'].item()} | {
        f'grad_norm_{name}': norm.item() for name, norm in norms.items() if name in moment.stage.heads}


GAUGES: dict[str, Gauge] = {'gradient_norms': gradient_norms}
