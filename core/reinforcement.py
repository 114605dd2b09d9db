"""Group-relative policy gradient: a diffusion model writes groups of texts and learns from how their rewards compare.

GRPO (Shao et al. 2024, DeepSeekMath, section 4.1) with the exact likelihood of the drawn path. For each prompt a reveal
policy draws a group of texts, each with K trunk calls. The advantage of a text with reward r is

    A = (r - mean) / (std + 1e-4)        mean and standard deviation over its group

and the loss is the mean over texts of

    - A / n * sum of log p  +  beta / n * sum of (q - 1 - log q),   q = p_start / p

over the n drawn tokens. p is a token's probability when the path reveals it (core/sampling/path_likelihood.py), and
p_start is the probability of the same token on the same path under the model that training began with. The second part
is Schulman's estimate k3 of the divergence KL(p || p_start). Each group serves one step only. So p equals the
probability with which the text was drawn, their ratio is 1, and there is nothing to clip.

Letters: B rows of a micro-step, T tokens of a row, G rows of a group.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.batches import Batch, BatchPlan, draw_windows, micro_steps, whole_batch
from core.common.drawing import DrawRule
from core.common.precision import to_exact
from core.common.randomness import Purpose, RowRandom, keyed
from core.common.timing import TimingAccumulator
from core.objective import Losses
from core.rewards import Reward, repeated_share
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.path_likelihood import Scorer, path_log_probabilities
from core.sampling.policies import Policy
from core.sampling.prompt import Layout
from core.stages import Stage
from core.validation import VALIDATION_SEED, HeldOut, Validation, validate_generator
from model import GPT
from sample_utils import Head

SPREAD = 1e-4  # added to the standard deviation of a group's rewards
MEASURES = ('reward', 'kl', 'entropy', 'repetition')  # means over texts, of a validation and in the log of a step


class Reinforcement(NamedTuple):
    """How texts are drawn and rewarded.

    prompt_length: tokens of the corpus that a text begins with. policy: of a row of POLICIES; it is deterministic and
    does not depend on the weights. head: what fills the masks. kl_weight: beta. start: the model that training began
    with. autocast: a lower precision for the network, or None.
    """

    mask_token_id: int
    group_size: int
    prompt_length: int
    policy: Policy
    head: Head
    kl_weight: float
    start: GPT
    reward: Reward
    autocast: torch.dtype | None = None

    def prompts(self, windows: Tensor) -> Tensor:
        """Windows int64 [B, T] with everything after the prompt masked."""
        position = torch.arange(windows.size(1), device=windows.device)
        return windows.masked_fill(position >= self.prompt_length, self.mask_token_id)


def prompt_batches(plan: BatchPlan, iteration: int, total: Callable[[int], int]) -> list[Batch]:
    """The micro-steps of one iteration: prompts with masks after them, one window of the corpus for each group."""
    batches = []
    for generator in micro_steps(plan, iteration):
        groups = replace(generator, rows=generator.rows // plan.noise.group_size)
        windows = draw_windows(plan, groups, plan.block_size)  # [B, T], equal within a group
        weights = torch.full((plan.rows.batch_size,), 1 / plan.rows.global_batch)
        batches.append(whole_batch(generator, plan.noise.prompts(windows), windows, weights))
    return batches


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """float64 [B]: A of each text from rewards [B], groups one after another; the sum over a group is 0."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True, correction=0) + SPREAD)).flatten()


def divergences(log_probabilities: Tensor, start: Tensor) -> Tensor:
    """k3 = q - 1 - log q of each token, from log-probabilities [B, T]. It is never negative, and 0 if p = p_start. Its
    mean over draws from p is KL(p || p_start) (Schulman 2020, "Approximating KL divergence")."""
    ratio = start - log_probabilities
    return ratio.expm1() - ratio


class Written(NamedTuple):
    """text [B, T]; rewards float64 [B]. log_probabilities, start float64 [B, T]: of the drawn tokens under the model,
    with its graph if gradients are enabled, and under the start; 0 in the prompt."""

    text: Layout
    rewards: Tensor
    log_probabilities: Tensor
    start: Tensor

    def per_token(self, values: Tensor) -> Tensor:
        """float64 [B]: the mean of values [B, T] over the drawn tokens."""
        return values.sum(1) / (~self.text.protected).sum(1)

    def measures(self) -> Tensor:
        """float64 [B, 4]: `MEASURES` of each text. entropy: -log p per drawn token; its mean over draws is the entropy.
        """
        return torch.stack((self.rewards, self.per_token(divergences(self.log_probabilities, self.start)),
                            -self.per_token(self.log_probabilities), repeated_share(self.text.tokens)), dim=1).detach()


def write(model: GPT, prompts: Tensor, allowed: Tensor, asked: Reinforcement, generator: RowRandom) -> Written:
    """Continue each of prompts int64 [B, T] with a text, reward it, and score it under `model` and the start."""
    def network(of: GPT) -> Network:
        return Network(of, TimingAccumulator(), asked.autocast)

    rule, scorer = DrawRule(allowed), Scorer(asked.policy, asked.head, allowed)
    settings = GenerationSettings('diffusion', rule, asked.policy, head=asked.head)
    protected = prompts != asked.mask_token_id
    text = Layout(generate(network(model), Layout(prompts, protected), settings, generator).tokens, protected)
    with torch.no_grad():
        rewards = asked.reward(text.tokens)
        start = path_log_probabilities(network(asked.start), text, scorer, generator)
    return Written(text, rewards, path_log_probabilities(network(model), text, scorer, generator), start)


class GroupObjective(nn.Module):
    """The loss above, used instead of `Objective`. Its printed value is beta * KL - reward, which has the same expected
    gradient: main is minus the mean reward."""

    def __init__(self, model: GPT, allowed: Tensor, asked: Reinforcement) -> None:
        super().__init__()
        self.model, self.asked = model, asked
        self.register_buffer('allowed', allowed, persistent=False)

    def forward(self, batch: Batch, stage: Stage, generator: RowRandom) -> Losses:
        """The loss of one micro-step; the texts of a row follow from (seed, iteration, row)."""
        of_iteration = keyed(generator.seed, generator.iteration, 0, 1).derived_seed(Purpose.REINFORCEMENT)
        written = write(self.model, to_exact(batch.inputs), self.allowed, self.asked, RowRandom(of_iteration, 0, to_exact(batch.rows)))
        weights = batch.main_weights.to(written.rewards.device).double()  # [B]
        advantages = group_advantages(written.rewards, self.asked.group_size)
        surrogate = -(weights * advantages * written.per_token(written.log_probabilities)).sum()
        kl = (weights * written.per_token(divergences(written.log_probabilities, written.start))).sum()
        main = -(weights * written.rewards).sum()
        # A head that drew nothing gets gradient 0 instead of none, since ranks wait for the same gradients.
        idle = sum(parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad) * 0.0
        total = main + (surrogate - surrogate.detach()) + self.asked.kl_weight * kl
        total, main, kl = (value.to(batch.inputs.device, torch.float32) for value in (total, main, kl))
        return Losses(total + idle, main, {'kl': kl}, weights @ written.measures())


def reinforcement_metrics(sums: Tensor) -> dict[str, float]:
    """`MEASURES` by the names under which they are logged."""
    return dict(zip(MEASURES, sums.tolist()))


@torch.no_grad()
def validate_rewards(model: GPT, held_out: HeldOut, allowed: Tensor, asked: Reinforcement) -> Validation:
    """beta * KL - reward of texts that `model` writes after held-out prompts, with the same noise at every validation.
    `further`: their `MEASURES`, and the NELBO, which shows whether the model forgets its corpus."""
    begin, found = time.perf_counter(), held_out.zeros(len(MEASURES))
    for place, rows in held_out.batches(model.config.block_size):
        device = held_out.runtime.device
        generator = keyed(VALIDATION_SEED, 0, place.start, len(rows), device)
        with held_out.runtime.autocast():
            found[place] = write(model, to_exact(asked.prompts(rows).to(device)), allowed, asked, generator).measures()
    found = held_out.runtime.total(found)  # [W, 4]
    values = asked.kl_weight * found[:, MEASURES.index('kl')] - found[:, MEASURES.index('reward')]  # [W]
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan
    further = reinforcement_metrics(found.mean(0)) | {'nelbo': validate_generator(model, held_out, allowed).value}
    return Validation(values.mean().item(), error, further, held_out.windows, time.perf_counter() - begin)
