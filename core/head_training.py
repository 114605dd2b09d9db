"""Training of heads on a pretrained model's frozen trunk, from a text file: train.py with --model.

The trunk is called once a batch, without gradients. Losses, batches and optimizers are those of other runs. The heads
with the lowest validation loss are kept in a file of their own (core/pretrained/head_file.py).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from configurator import bound_problems
from core.batches import BatchPlan, RowShare, unmasking_batches
from core.checkpoints.heads import heads_of
from core.common.errors import UserError, raise_problems
from core.common.files import unwritable
from core.common.printing import counted, say_if_heard
from core.common.randomness import RowRandom
from core.common.runtime import Runtime, has_foreach, start_runtime, stop_runtime
from core.noise import SCHEDULES, Masking, NoiseSchedule, seen_neighbours
from core.objective import Losses, Objective
from core.optimizer import learning_rate_at, make_optimizers, set_learning_rate
from core.option_problems import table_problems
from core.options import TrainConfig
from core.pretrained.head_file import HEAD_FIELDS, base_of, head_weights, save_head
from core.pretrained.loading import Source, load_pretrained, pretrained_problems
from core.pretrained.text import TextTokens, read_text, text_corpus
from core.pretrained.trunk import PretrainedTrunk
from core.stages import stage_at
from core.step_guard import MOST_IN_A_ROW, StepGuard
from core.validation import HeldOut, Validation, validate_generator

HEAD_FILE = 'head.safetensors'
HELD_OUT_SHARE = 0.1  # of the text, its end
WHOLE_SHARE = 0.25  # of the rows that a head learns from: they are masked entirely
# Options of train.py that say what a trunk is like or how it trains, and those of runs that go on.
_NOT_OF_HEADS = ('n_layer', 'n_head', 'n_embd', 'dropout', 'bias', 'attention_type', 'position_encoding',
                 'block_length', 'init_from_checkpoint', 'force_resume', 'eval_only', 'training_type',
                 'train_split', 'freeze_transformer', 'unfreeze_at_iteration', 'sampler_gradient', 'critic_gradient',
                 'compile', 'sharding', 'activation_checkpointing', 'wandb_log', 'always_save_checkpoint')
_STAGES = ('start_sampler_iteration', 'start_critic_iteration', 'end_critic_iteration', 'critic_alpha',
           'critic_target_scope', 'critic_row_stride', 'critic_fill')


def train_head(config: TrainConfig, explicit: Mapping[str, str], notes: list[str]) -> None:
    """Train heads as `config` (the options of train.py, `model` among them) says; `notes` are lines to print first."""
    raise_problems(_problems(config, explicit))
    runtime = start_runtime(config.device, config.dtype, False, width=config.n_embd, iterations=config.max_iters)
    try:
        if runtime.world_size > 1:
            raise UserError(f'{runtime.world_size} ranks were started, but a head on a pretrained model trains in one '
                            f'process; start it without torchrun')
        for line in [*notes, *runtime.reasons]:
            say_if_heard(line)
        HeadRun(config, runtime, config.block_size if 'block_size' in explicit else None, say_if_heard).work()
    finally:
        stop_runtime(runtime)


def _problems(config: TrainConfig, explicit: Mapping[str, str]) -> list[str]:
    """What is wrong with the options before any file is read."""
    problems = [*bound_problems(config), *table_problems(config), *pretrained_problems(config, explicit)]
    problems += [f'{name} does not apply to model, whose trunk stays as it is; leave it out'
                 for name in _NOT_OF_HEADS if name in explicit]
    if config.init_from == 'resume':
        problems.append('init_from is resume, but heads on a pretrained model keep no state to go on from; train them '
                        'again from scratch')
    if config.text_file is None:
        problems.append('model is given, but no text to learn from; add --text_file=FILE')
    if not config.add_sampler_head and not config.add_critic_head:
        problems.append('model is given, but no head is to be trained; take config/train_head_on_pretrained.py, or '
                        '--add_sampler_head=True')
    path = Path(config.out_dir) / HEAD_FILE
    if path.exists() and not config.overwrite:
        problems.append(f'{path} exists; name another --out_dir, or replace it with --overwrite=True')
    return problems


@dataclass(frozen=True)
class _Text:
    """learnt: what is trained on; held_out: the end of the text, which is not."""

    learnt: TextTokens
    held_out: TextTokens


class HeadRun:
    """One training of heads. window: tokens of a window, None for what suits the text."""

    def __init__(self, config: TrainConfig, runtime: Runtime, window: int | None, say: Callable[[str], None]) -> None:
        self.config, self.runtime, self.say = config, runtime, say
        fields = {name: getattr(config, name) for name in (*HEAD_FIELDS, *_STAGES)}
        self.base = load_pretrained(Source.of(config), runtime.device, runtime.dtype, fields, config.seed)
        text = read_text(config.text_file, self.base.vocabulary, self.base.model.config.block_size, window)
        self.text = _Text(*text.parted(HELD_OUT_SHARE))
        if self.text.learnt.windows < 1:
            raise UserError(f'text_file {config.text_file} has {text.windows} windows, but training needs at least 2, '
                            f'one of them to validate on; give a longer text')
        for line in (*self.base.said, *text.said):
            say(line)
        model = self.model = self.base.model.at_most(text.length)
        self.allowed = self.base.vocabulary.allowed.to(runtime.device)
        self.masking = Masking(model.config.mask_token_id, config.loss_weighting, seen_neighbours(model.config),
                               config.critic_row_stride, config.critic_target_scope,
                               schedule=SCHEDULES[config.noise_schedule])
        rows = RowShare(config.batch_size, config.gradient_accumulation_steps)
        self.plan = BatchPlan(self.text.learnt.ids, config.seed, text.length, rows,
                              self.masking._replace(schedule=often_whole(self.masking.schedule)), text.stride)
        self.objective = Objective(model, self.allowed)
        self.heads = nn.ModuleDict({head.module: getattr(model, head.module) for head in heads_of(model.config)})
        self.averaged = deepcopy(self.heads).requires_grad_(False)
        self.optimizers = make_optimizers(self.heads, config.optimizer, config.learning_rate, config.weight_decay,
                                          (config.beta1, config.beta2), runtime.matrix_dtype())
        self.guard = StepGuard(runtime.device, config.skip_spikes)
        self.best, self.seconds = math.inf, 0.0

    def work(self) -> None:
        """Train to max_iters, validate at intervals, keep the best heads."""
        config, folder = self.config, Path(self.config.out_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error
        count = sum(parameter.numel() for parameter in self.heads.parameters())
        rows, tokens = counted(self.plan.rows.global_batch, 'row'), counted(self.plan.block_size, 'token')
        self.say(f'heads: {count:,} parameters on a frozen trunk; {rows} of {tokens} an iteration')
        for iteration in range(config.max_iters):
            if iteration % config.eval_interval == 0:
                self.evaluate(iteration, folder / HEAD_FILE)
            start = time.perf_counter()
            losses = self.step(iteration)
            due = iteration % config.log_interval == 0 or iteration == config.max_iters - 1
            words = _shown(losses) if due else ''  # waits for the device
            self.seconds += time.perf_counter() - start
            if due:
                self.say(f'iter {iteration}: {words}, {self.seconds:.1f}s')
                if self.guard.skipped().in_a_row >= MOST_IN_A_ROW:
                    raise UserError(f'{MOST_IN_A_ROW} steps in a row had a loss or gradients that are not finite; '
                                    f'lower learning_rate ({config.learning_rate:g})')
        self.evaluate(config.max_iters, folder / HEAD_FILE)
        self.say(f'{counted(config.max_iters, "iteration")} in {self.seconds / 60:.1f} minutes; the best heads are in '
                 f'{folder / HEAD_FILE}')

    def step(self, iteration: int) -> Losses:
        """One iteration: losses of its micro-steps, clipping, update, averaging."""
        config, stage = self.config, stage_at(self.model.config, iteration)
        set_learning_rate(self.optimizers, learning_rate_at(
            iteration, learning_rate=config.learning_rate, min_lr=config.min_lr, warmup_iters=config.warmup_iters,
            lr_decay_iters=config.lr_decay_iters, decay_lr=config.decay_lr))
        parts = []
        for batch in unmasking_batches(self.plan, iteration, int):
            batch = batch.to(self.runtime.device)
            with self.runtime.autocast():
                parts.append(self.objective(batch, stage, RowRandom(self.plan.seed, iteration, batch.rows)))
            if parts[-1].heads:
                sum(stage.heads[name] * loss for name, loss in parts[-1].heads.items()).backward()
        losses = Losses(sum(one.total for one in parts).detach(), sum(one.main for one in parts).detach(),
                        {name: sum(one.heads[name] for one in parts).detach() for name in parts[0].heads})
        norms = [nn.utils.clip_grad_norm_(head.parameters(), config.grad_clip or math.inf,
                                          foreach=has_foreach(self.runtime.device)) for head in self.heads.values()]
        refused = self.guard.refuses(iteration, losses.total, norms[0], *norms[1:])
        for optimizer in self.optimizers:
            optimizer.found_inf = refused
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._average(iteration)
        return losses

    @torch.no_grad()
    def _average(self, iteration: int) -> None:
        """Exponential moving average of the heads, as `TrainingState.update_average` has it."""
        decay = min(self.config.ema_decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.heads.parameters()), 1 - decay)

    def evaluate(self, iteration: int, path: Path) -> None:
        """Validate the averaged heads, and save them where they are the best so far."""
        config, held_out = self.config, self.text.held_out
        windows = held_out.spread(min(held_out.windows, config.eval_iters * config.batch_size))
        corpus = text_corpus(config.text_file, windows, self.base.vocabulary)
        with served(self.model, self.averaged), self.runtime.autocast():
            found = validate_generator(self.model, HeldOut(corpus, self.runtime, len(windows), config.batch_size),
                                       self.allowed, self.masking)
            value, words = _value(found, iteration), found.line(f'step {iteration}: val')
            best = value < self.best and iteration > 0
            self.say(words + (', the best so far' if best else ''))
            if best:
                self.best = value
                save_head(path, base_of(self.base), (self.model.config, {}), head_weights(self.model), iteration)


def often_whole(schedule: NoiseSchedule) -> NoiseSchedule:
    """`schedule` run through in the first part of the time; in the rest, `WHOLE_SHARE` of it, everything is masked.

    Every text begins with a trunk call that sees nothing, and the fewer calls it takes, the more of it comes from that
    one. A model that was trained with a seventh of the text masked does not know such input: its hidden states there
    are unlike all others, so a head must have seen them often (measured in docs/pretrained.md). A schedule alone almost
    never masks everything.
    """
    def stretched(times: Tensor) -> Tensor:
        return (times / (1 - WHOLE_SHARE)).clamp(max=1)

    return NoiseSchedule(lambda times: schedule.mask_probability(stretched(times)),
                         lambda masked: schedule.time_of(masked) * (1 - WHOLE_SHARE),
                         lambda times: schedule.elbo_weight(stretched(times)))


def _value(found: Validation, iteration: int) -> float:
    """What decides which heads are kept: the sampler head's loss. A critic alone is not validated here, so its last
    state is kept."""
    return found.further.get('loss_sampler', -float(iteration))


@contextmanager
def served(model: PretrainedTrunk, heads: nn.ModuleDict) -> Iterator[None]:
    """`model` with other heads for a while."""
    own = {name: getattr(model, name) for name in heads}
    for name, head in heads.items():
        setattr(model, name, head)
    try:
        yield
    finally:
        for name, head in own.items():
            setattr(model, name, head)


def _shown(losses: Losses) -> str:
    """The losses in one line: the trunk's own at masked positions, and those of the heads."""
    parts: list[tuple[str, Tensor]] = [('trunk', losses.main), *losses.heads.items()]
    return ', '.join(f'{name} {loss.item():.4f}' for name, loss in parts)
