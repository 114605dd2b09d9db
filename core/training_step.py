"""One training step: corrupt, forward, loss, backward, clip, update."""

from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.batches import BATCH_MAKERS, BatchPlan
from core.common.randomness import Purpose, RowRandom
from core.common.runtime import Runtime
from core.objective import Losses, Objective
from core.optimizer import make_optimizers, set_learning_rate
from core.sharding import shard
from core.stages import Stage, critic_alpha, stage_at
from core.step_guard import StepGuard
from model import GPT


class TrainingState:
    """Everything that a step changes: model, averaged model, optimizers, and the stage that they are in."""

    def __init__(self, model: GPT, allowed: Tensor, runtime: Runtime, plan: BatchPlan, kind: str, *, optimizer: str,
                 learning_rate: float, weight_decay: float, betas: tuple[float, float], grad_clip: float,
                 ema_decay: float, spike_deviations: float = 0.0, activation_checkpointing: bool = False,
                 sharded: bool = False) -> None:
        self.model, self.runtime, self.plan, self.kind = model, runtime, plan, kind
        self.grad_clip, self.ema_decay = grad_clip, ema_decay
        self.objective = Objective(model, allowed, kind)
        if runtime.compile:
            self.objective.compile_parts()
        self.averaged = deepcopy(model).eval().requires_grad_(False)
        for block in model.transformer['h']:
            block.recompute = activation_checkpointing
        self.mesh = shard(self.objective, self.averaged, runtime) if sharded else None
        self.optimizers = make_optimizers(model, optimizer, learning_rate, weight_decay, betas, runtime.matrix_dtype())
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype is torch.float16)
        self.guard = StepGuard(runtime.device, spike_deviations)
        self.stage: Stage | None = None
        self.parallel: nn.Module = self.objective

    def enter(self, stage: Stage, trunk_frozen: bool) -> None:
        """Let exactly the parameters that this stage trains have gradients; ranks then wait for no others."""
        if (stage, trunk_frozen) == self.stage:
            return
        self.stage = stage, trunk_frozen
        active = {'sampler_head': stage.sampler, 'critic_head': stage.critic, 'classifier': True, 'scorer': True}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(active.get(name.split('.')[0], not trunk_frozen))
        if self.runtime.world_size > 1 and self.mesh is None:
            self.parallel = nn.parallel.DistributedDataParallel(self.objective)

    def leave_ranks(self) -> None:
        """Let go of what talks to the other ranks, to be called before `stop_runtime`.

        Were it the last to hold the group of processes, its end would wait for gloo's threads without letting go of
        Python, which such a thread may be waiting for (pytorch issue 56297): the process would never end.
        """
        self.parallel = self.objective

    def clip_gradients(self) -> tuple[Tensor, Tensor]:
        """Clip the sampler head's gradients apart from all others, so that it moves nothing outside itself.

        Returns the norms before clipping: of the others, and of the sampler head's.
        """
        head, others = [], []
        for name, parameter in self.model.named_parameters():
            (head if name.startswith('sampler_head.') else others).append(parameter)
        limit = self.grad_clip or float('inf')
        head_norm = nn.utils.clip_grad_norm_(head, limit, foreach=True)
        norm = nn.utils.clip_grad_norm_(others, limit, foreach=True)
        return (norm, head_norm) if self.mesh is None else tuple(_summed(one) for one in (norm, head_norm))

    @torch.no_grad()
    def update_average(self, iteration: int) -> None:
        """Exponential moving average of the weights; the decay grows to ema_decay, so early weights are forgotten."""
        decay = min(self.ema_decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay)


def _summed(norm: Tensor) -> Tensor:
    """A norm of gradients that are cut over the ranks, from every rank's part."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def training_step(state: TrainingState, iteration: int, learning_rate: float) -> Losses:
    """Step number `iteration`: moves the model, returns its losses over the global batch (on the device, detached).

    A step that `state.guard` refuses leaves weights and optimizers as they were.
    """
    runtime, plan, config = state.runtime, state.plan, state.model.config
    stage = stage_at(config, iteration)
    trunk_frozen = config.freeze_transformer and \
        (config.unfreeze_at_iteration is None or iteration < config.unfreeze_at_iteration)
    state.enter(stage, trunk_frozen)
    multiplier = config.unfreeze_lr_multiplier if config.freeze_transformer else 1.0
    set_learning_rate(state.optimizers, learning_rate, multiplier)

    parts = []
    batches = BATCH_MAKERS[state.kind](plan, iteration, runtime.total_count)
    for micro_step, batch in enumerate(batches):
        # The first row differs by micro-step and rank, and so does their dropout.
        torch.manual_seed(RowRandom(plan.seed, iteration, batch.rows).derived_seed(Purpose.DROPOUT))
        batch = batch.to(runtime.device)
        generator = RowRandom(plan.seed, iteration, batch.rows)
        last = micro_step == len(batches) - 1
        together = last or runtime.world_size == 1 or state.mesh is not None  # whole gradients would not be kept
        with nullcontext() if together else state.parallel.no_sync():
            with runtime.autocast():
                losses = state.parallel(batch, stage, critic_alpha(config, iteration), generator)
            state.scaler.scale(losses.total * runtime.world_size).backward()  # ranks average their gradients
        parts.append(losses)

    losses = Losses(*(None if one[0] is None else runtime.total(torch.stack(one).detach().sum(0))
                      for one in zip(*parts)))
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    norm, head_norm = state.clip_gradients()
    refused = state.guard.refuses(iteration, losses.main, norm, losses.total, head_norm)
    for optimizer in state.optimizers:
        optimizer.found_inf = refused  # where it is 1 the fused AdamW and Muon change nothing
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.scaler.update()
    state.update_average(iteration)
    return losses
