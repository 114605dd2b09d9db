"""The heads of a generator: which of them had begun to train when a checkpoint was written."""

from model import GPTConfig


def started_heads(model_config: GPTConfig, iteration: int) -> tuple[bool, bool, list[str]]:
    """Whether the sampler and the critic head had begun to train at `iteration`, and what to say of those not begun."""
    said = []
    sampler = model_config.add_sampler_head and iteration > model_config.start_sampler_iteration
    critic = model_config.add_critic_head and iteration > model_config.start_critic_iteration
    for name, has, started, start in (
            ('sampler', model_config.add_sampler_head, sampler, model_config.start_sampler_iteration),
            ('critic', model_config.add_critic_head, critic, model_config.start_critic_iteration)):
        if has and not started:
            said.append(f'the {name} head is ignored: its stage begins at iteration {start}, the checkpoint is of '
                        f'iteration {iteration}')
    return sampler, critic, said
