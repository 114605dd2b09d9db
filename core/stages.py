"""The stages of a training: which parts of the model train at an iteration, and with what weight."""

from collections.abc import Mapping
from typing import NamedTuple

from core.checkpoints.heads import HEADS, heads_of
from model import GPTConfig


class Stage(NamedTuple):
    """heads: the weight of the loss of each head that trains, by the head's name; trunk: whether the trunk trains."""

    heads: Mapping[str, float]
    trunk: bool = True


def stage_at(config: GPTConfig, iteration: int) -> Stage:
    """Stage 1 trains the trunk. Stage 2 begins at start_sampler_iteration and adds the sampler head. Stage 3 begins at
    start_critic_iteration and adds the critic. A head that the model lacks never begins. A frozen trunk begins to train
    at unfreeze_at_iteration."""
    heads = {head.name: head.weight_at(config, iteration) for head in heads_of(config)
             if iteration >= head.start(config)}
    thaws = config.unfreeze_at_iteration
    return Stage(heads, not config.freeze_transformer or thaws is not None and iteration >= thaws)


def trains(stage: Stage, module: str) -> bool:
    """Whether the parameters of `module` train. It is an attribute of `GPT`: the trunk, a head or an output layer."""
    heads = {head.module: head.name in stage.heads for head in HEADS}
    return stage.trunk if module == 'transformer' else heads.get(module, True)


def all_heads_trained_from(config: GPTConfig) -> int:
    """The number of steps after which every head has trained for at least one step with the full weight of its loss.
    The best checkpoint is chosen from here on."""
    return max((head.trained_from(config) for head in heads_of(config)), default=0)
