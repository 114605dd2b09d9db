"""One training step: corrupt, forward, loss, backward, clip, update."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.batches import Batch, BatchPlan
from core.checkpoints.heads import CRITIC, HEADS
from core.common.randomness import Purpose, RowRandom
from core.common.runtime import Runtime, has_foreach
from core.objective import Losses
from core.optimizer import make_capturable, make_optimizers, set_learning_rate
from core.recorded_step import StepRecorder, Taken
from core.sampling.recorded_waves import RecordedWaves
from core.sharding import shard
from core.stages import Stage, stage_at, trains
from core.step_guard import StepGuard
from core.training_kinds import TRAINING
from model import GPT


@dataclass(frozen=True)
class StepSettings:
    """How a step changes the weights.

    optimizer: 'muon' or 'adamw'; learning_rate: the first one; grad_clip: largest gradient norm, 0 for none; ema_decay:
    of the averaged weights; spike_deviations: of `StepGuard`; activation_checkpointing: the backward pass computes
    each layer again; sharded: weights are cut over the ranks; cuda_graphs: steps are recorded (core/recorded_step.py).
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    grad_clip: float
    ema_decay: float
    spike_deviations: float = 0.0
    activation_checkpointing: bool = False
    sharded: bool = False
    cuda_graphs: bool = False


class TrainingState:
    """Everything that a step changes: model, averaged model, optimizers, and the stage that they are in."""

    def __init__(self, model: GPT, allowed: Tensor, runtime: Runtime, plan: BatchPlan, kind: str,
                 settings: StepSettings) -> None:
        self.model, self.runtime, self.plan, self.settings = model, runtime, plan, settings
        self.training = TRAINING[kind]
        self.objective = self.training.objective(model, allowed, plan.noise)
        if runtime.compile:
            self.objective.compile_parts(runtime.world_size)
        self.averaged = deepcopy(model).eval().requires_grad_(False)
        for block in model.transformer['h']:
            block.recompute = settings.activation_checkpointing
        self.mesh = shard(self.objective, self.averaged, runtime) if settings.sharded else None
        self.optimizers = make_optimizers(model, settings.optimizer, settings.learning_rate, settings.weight_decay,
                                          settings.betas, runtime.matrix_dtype())
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype is torch.float16)
        self.guard = StepGuard(runtime.device, settings.spike_deviations)
        self.gradient_norms: dict[str, Tensor] = {}  # of the last step before clipping, by whose they are
        self.stage: Stage | None = None
        self.parallel: nn.Module = self.objective
        self.average_weight: float | Tensor = 0.0  # of the new weights in the average
        self.recorder: StepRecorder | None = None
        if settings.cuda_graphs:  # a recorded step reads from the device what changes
            self.recorder, self.average_weight = StepRecorder(), torch.zeros((), device=runtime.device)
            make_capturable(self.optimizers, runtime.device)
            self.objective.waves = RecordedWaves()

    def enter(self, stage: Stage) -> None:
        """Let only the parameters that this stage trains have gradients, so that ranks wait for no others."""
        before, self.stage = self.stage, stage
        if before is not None and (before.heads.keys(), before.trunk) == (stage.heads.keys(), stage.trunk):
            return
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trains(stage, name.split('.')[0]))
        if self.runtime.world_size > 1 and self.mesh is None:
            self.parallel = nn.parallel.DistributedDataParallel(self.objective)

    def leave_ranks(self) -> None:
        """Drop the object that talks to the other ranks; call this before `stop_runtime`.

        If it were the last to hold the group of processes, its destructor would wait for gloo's threads while it holds
        Python's lock. Such a thread may itself wait for that lock, and the process would never end (pytorch issue
        56297).
        """
        self.parallel = self.objective

    def clip_gradients(self) -> dict[str, Tensor]:
        """Clip the gradients. A head that is `clipped_apart` is clipped by itself, so it does not scale the others.

        Returns the norms before clipping: first 'main', of all other parameters, then those of these heads by name.
        """
        apart = {head.module: head.name for head in HEADS if head.clipped_apart}
        groups: dict[str, list[nn.Parameter]] = {'main': [], **{name: [] for name in apart.values()}}
        for name, parameter in self.model.named_parameters():
            groups[apart.get(name.split('.')[0], 'main')].append(parameter)
        limit = self.settings.grad_clip or float('inf')
        foreach = has_foreach(self.runtime.device)
        norms = {name: nn.utils.clip_grad_norm_(group, limit, foreach=foreach) for name, group in groups.items()}
        return norms if self.mesh is None else {name: _summed(one) for name, one in norms.items()}

    def set_rates(self, iteration: int, learning_rate: float) -> None:
        """Set what changes from step to step: the learning rate of every group of weights, and the weight of the new
        weights in their average. The decay of the average grows to ema_decay, so early weights are forgotten."""
        config = self.model.config
        set_learning_rate(self.optimizers, learning_rate,
                          config.unfreeze_lr_multiplier if config.freeze_transformer else 1.0)
        weight = 1 - min(self.settings.ema_decay, (1 + iteration) / (10 + iteration))
        if isinstance(self.average_weight, Tensor):
            self.average_weight.fill_(weight)
        else:
            self.average_weight = weight

    @torch.no_grad()
    def update_average(self) -> None:
        """Exponential moving average of the weights."""
        pairs = list(self.averaged.parameters()), list(self.model.parameters())
        if not isinstance(self.average_weight, Tensor):
            torch._foreach_lerp_(*pairs, self.average_weight)
            return
        for mean, weight in zip(*pairs):
            mean.lerp_(weight, self.average_weight)


def _summed_losses(parts: list[Losses], runtime: Runtime) -> Losses:
    """The losses of all micro-steps and ranks, detached."""
    def summed(tensors: list[Tensor]) -> Tensor:
        return runtime.total(torch.stack(tensors).detach().sum(0))

    first = parts[0]
    return Losses(summed([one.total for one in parts]), summed([one.main for one in parts]),
                  {name: summed([one.heads[name] for one in parts]) for name in first.heads},
                  None if first.sums is None else summed([one.sums for one in parts]))


def _summed(norm: Tensor) -> Tensor:
    """A norm of gradients that are cut over the ranks, from every rank's part."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def training_step(state: TrainingState, iteration: int, learning_rate: float) -> Losses:
    """Step number `iteration`: moves the model, returns its losses over the global batch (on the device, detached).

    A step that `state.guard` refuses leaves weights and optimizers as they were.
    """
    runtime, plan = state.runtime, state.plan
    stage = stage_at(state.model.config, iteration)
    state.enter(stage)
    state.set_rates(iteration, learning_rate)
    batches = state.training.batches(plan, iteration, runtime.total_count)
    if state.recorder is not None and CRITIC.name not in stage.heads:  # its text is drawn, which waits for the device
        _seed_dropout(plan, iteration, batches[0])
        kind = frozenset(stage.heads), stage.trunk

        def whole(batch: Batch) -> Taken:
            state.model.zero_grad(set_to_none=True)  # a recording that failed may have left some
            return update(state, iteration, [losses_with_gradients(state, batch, stage, iteration)])

        taken = state.recorder.step(kind, batches[0], whole, runtime.device)
        state.gradient_norms = taken.norms
        return taken.losses
    parts = []
    for micro_step, batch in enumerate(batches):
        _seed_dropout(plan, iteration, batch)
        last = micro_step == len(batches) - 1
        together = last or runtime.world_size == 1 or state.mesh is not None  # shards keep no whole gradients
        with nullcontext() if together else state.parallel.no_sync():
            parts.append(losses_with_gradients(state, batch.to(runtime.device), stage, iteration))
    taken = update(state, iteration, parts)
    state.gradient_norms = taken.norms
    return taken.losses


def _seed_dropout(plan: BatchPlan, iteration: int, batch: Batch) -> None:
    """Seed dropout by the first row, which differs by micro-step and rank."""
    torch.manual_seed(RowRandom(plan.seed, iteration, batch.rows).derived_seed(Purpose.DROPOUT))


def losses_with_gradients(state: TrainingState, batch: Batch, stage: Stage, iteration: int) -> Losses:
    """The losses of a micro-step on the device; their gradients are added to those of the weights."""
    with state.runtime.autocast():
        losses = state.parallel(batch, stage, RowRandom(state.plan.seed, iteration, batch.rows))
    state.scaler.scale(losses.total * state.runtime.world_size).backward()  # ranks average their gradients
    return losses


def update(state: TrainingState, iteration: int, parts: list[Losses]) -> Taken:
    """Move the weights and their average by the gradients of the micro-steps, unless the guard refuses."""
    losses = _summed_losses(parts, state.runtime)
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    norms = state.clip_gradients()
    norm, *head_norms = norms.values()
    refused = state.guard.refuses(iteration, losses.main, norm, losses.total, *head_norms)
    for optimizer in state.optimizers:
        optimizer.found_inf = refused  # where it is 1 the fused AdamW and Muon change nothing
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.scaler.update()
    state.update_average()
    return Taken(losses, norms)
