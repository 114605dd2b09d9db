"""The training loop: evaluate and save at intervals, step in between, stop cleanly when asked to."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch.distributed as distributed

from core.batches import BatchPlan, RowShare
from core.checkpoints.checkpoint import Checkpoint, checkpoint_hash, load_checkpoint
from core.checkpoints.heads import HEADS, SAMPLER, heads_of
from core.checkpoints.run_folder import LATEST, METRICS, RunFolder, latest_checkpoint
from core.checkpoints.weights import check_resume, initialise_from, load_weights, model_config_to_dict
from core.common.drawing import allowed_ids
from core.common.errors import UserError, raise_problems
from core.common.precision import exact_device
from core.common.printing import complain, counted, optional, say_if_heard
from core.common.runtime import (COMPILING_SECONDS, Runtime, handling, is_compile_error, is_lost_rank, start_runtime,
                                 stop_runtime)
from core.data.corpus import Corpus
from core.data.folders import data_folder
from core.data.prepare import ensure_corpus
from core.data.text_figures import corpus_figures
from core.gauges import GAUGES, Moment
from core.logger import IterationRecord, RunLogger, read_metrics
from core.loss_curve import plot_loss_curve
from core.objective import Losses
from core.optimizer import learning_rate_at
from core.option_problems import option_problems, world_problems
from core.options import TrainConfig
from core.sampling.preview import preview
from core.sharding import cut, gathered, whole, whole_weights
from core.stages import Stage, all_heads_trained_from, stage_at
from core.step_guard import MOST_IN_A_ROW
from core.training_kinds import GRPO, TRAINING, kind_of, run_label, training_of, wandb_name
from core.training_step import StepSettings, TrainingState, training_step
from core.validation import HeldOut, Validation
from model import GPT, GPTConfig

TRAJECTORY = ('seed', 'loss_weighting', 'noise_schedule', 'remasking_loss_type', 'remasking_corruption',
              'corruption_checkpoint', 'batch_size', 'gradient_accumulation_steps', 'learning_rate', 'min_lr',
              'warmup_iters', 'lr_decay_iters', 'decay_lr', 'weight_decay', 'beta1', 'beta2', 'grad_clip', 'ema_decay',
              'reward', 'judge_checkpoint_name', 'repetition_weight', 'group_size', 'prompt_length', 'draw_policy',
              'draw_calls', 'kl_weight')
SECONDS_BETWEEN_CURVES = 20  # at least, while a run goes on
# What ends a run once it is saved, with exit code 128 + number: Ctrl-C, a scheduler's end, a closed window, Slurm's
# warning before the time is over, Ctrl-Break. Each where the system has it.
STOPPING = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGBREAK')
            if hasattr(signal, name)]


def train(config: TrainConfig, notes: list[str]) -> None:
    """Train as `config` (the options of train.py) says; `notes` are lines to print first.

    Raises UserError for wrong options or files. When a signal stops the run, the run is saved first, and SystemExit
    with 128 + the signal's number follows.
    """
    problems = option_problems(config)
    try:
        compile = False if config.sharding == 'full' or training_of(config) == GRPO else config.compile
        runtime = start_runtime(config.device, config.dtype, compile, width=config.n_embd,
                                iterations=config.max_iters, backend=config.backend)
    except UserError as error:
        raise_problems([*problems, str(error)])
        raise
    try:
        raise_problems(problems + world_problems(config, runtime))
        say = say_if_heard if runtime.is_writer else lambda line: None
        for line in [*notes, *runtime.reasons]:
            say(line)
        corpus = ready_corpus(config, runtime, say)
        run = Run(config, runtime, corpus, say)
        if config.eval_only:
            run.evaluate_only()
        else:
            run.work()
    except RuntimeError as error:
        if runtime.world_size == 1 or not is_lost_rank(error):
            raise
        raise SystemExit(f'rank {runtime.rank} stops, because another rank has ended and its messages say why; go on '
                         f'from the last checkpoint with --init_from=resume') from error
    finally:
        stop_runtime(runtime)


def ready_corpus(config: TrainConfig, runtime: Runtime, say: Callable[[str], None]) -> Corpus:
    """The corpus, prepared by one rank if it is missing."""
    root = data_folder(config.data_dir)
    if runtime.is_writer:
        corpus = ensure_corpus(config.dataset, say, root)
    if runtime.world_size > 1:
        distributed.barrier()
    return corpus if runtime.is_writer else ensure_corpus(config.dataset, say, root)


def build_model_config(config: TrainConfig, corpus: Corpus) -> GPTConfig:
    """The model's part of the options, with the corpus's vocabulary. UserError lists every problem."""
    vocabulary, names = corpus.vocabulary, {one.name for one in dataclasses.fields(config)}
    values = {one.name: getattr(config, one.name) for one in dataclasses.fields(GPTConfig) if one.name in names}
    values['predicts'] = 'own' if config.predicts == 'auto' else config.predicts
    try:
        kind = kind_of(config)
        return GPTConfig(**values, mode=kind.mode, num_token_classes=kind.classes, vocab_size=vocabulary.size,
                         mask_token_id=vocabulary.mask_token_id, wrong_token_id=vocabulary.wrong_token_id,
                         pad_token_id=vocabulary.pad_token_id, cls_token_id=vocabulary.cls_token_id)
    except ValueError as error:
        raise UserError(str(error)) from error


class Run:
    """One training run in one folder."""

    def __init__(self, config: TrainConfig, runtime: Runtime, corpus: Corpus, say: Callable[[str], None]) -> None:
        self.config, self.runtime, self.corpus = config, runtime, corpus
        self.model_config = build_model_config(config, corpus)
        self.kind, training = kind_of(config), training_of(config)
        self.training = TRAINING[training]
        rows = RowShare(config.batch_size, config.gradient_accumulation_steps // runtime.world_size, runtime.rank,
                        runtime.world_size)
        plan = BatchPlan(corpus.tokens(config.train_split, config.block_size + 1), config.seed, config.block_size, rows,
                         self.training.noise(config, corpus.vocabulary, runtime))
        figures = corpus_figures(corpus, config.block_size, config.train_split) if self.kind.writes_text else None
        self.text_figures = None if figures is None else figures.to_builtins()
        self.read = {name: checkpoint_hash(Path(vars(config)[name])) for name in self.training.reads(config)}
        model = GPT(self.model_config, config.seed).to(runtime.device)
        if config.init_from == 'scratch' and config.init_from_checkpoint:
            initialise_from(model, config.init_from_checkpoint, corpus.vocabulary.hash, say)
        self.allowed = allowed_ids(self.model_config.vocab_size, corpus.vocabulary.base_size, runtime.device)
        settings = StepSettings(config.optimizer, config.learning_rate, config.weight_decay,
                                betas=(config.beta1, config.beta2), grad_clip=config.grad_clip,
                                ema_decay=config.ema_decay, spike_deviations=config.skip_spikes,
                                activation_checkpointing=config.activation_checkpointing,
                                sharded=config.sharding == 'full', cuda_graphs=config.cuda_graphs)
        self.state = TrainingState(model, self.allowed, runtime, plan, training, settings)
        self.iteration, self.best_value, self.best_is_final, self.seconds = 0, None, False, 0.0
        self.unprinted: list[float] = []  # seconds of the iterations since the last line
        self.skips_told = 0
        self.has_saved = False  # whether there is a checkpoint of this run
        self.wandb_id: str | None = None  # of the run at W&B that this one is, once there is one
        self.parts: tuple[frozenset[str], bool] | None = None  # heads and trunk that trained last
        self.drawn = time.monotonic()  # when the loss curve was drawn
        self.asked_to_stop: signal.Signals | None = None

    def evaluate_only(self) -> None:
        """Validate the weights once and write nothing."""
        say = say_if_heard if self.runtime.is_writer else lambda line: None
        if self.config.init_from == 'resume':
            self.resume(latest_checkpoint(self.config.out_dir, say), say)
        say(self.validate().line(f'step {self.iteration}: val {self.training.value}'))

    def work(self) -> None:
        """Train to max_iters in the run folder."""
        config, runtime = self.config, self.runtime
        say = say_if_heard if runtime.is_writer else lambda line: None
        self.folder = RunFolder(config.out_dir, config.init_from == 'resume') if runtime.is_writer else None
        try:
            if not self.open_folder(say):
                return
            rate, words = runtime.matrix_rate() if runtime.is_writer else (1.0, '')
            self.matrix_rate = rate
            say(f'model: {self.state.model.parameter_count():,} parameters; '
                f'{counted(self.state.plan.rows.global_batch, "row")} of {counted(config.block_size, "token")} an '
                f'iteration; mfu is a share of {words}')
            for head in heads_of(self.model_config):
                if head.start(config) >= config.max_iters:
                    say(f'the {head.name} head would begin at iteration {head.start(config)}, after the last of '
                        f'{config.max_iters}: it stays untrained')
            self.logger = RunLogger(Path(config.out_dir), wandb_log=config.wandb_log, project=config.wandb_project,
                                    run_name=wandb_name(config), config=dataclasses.asdict(config),
                                    start_iteration=self.iteration, total_iterations=config.max_iters,
                                    enabled=runtime.is_writer,
                                    metrics=None if self.folder is None else self.folder.place(METRICS),
                                    wandb_id=self.wandb_id)
            self.wandb_id = self.logger.wandb_id
            try:
                with handling(STOPPING, self.on_signal):
                    self.loop()
            finally:
                self.logger.close()
                if self.folder is not None and not self.folder.replaces:
                    self.draw_curve()
            if self.has_saved:
                say(f'next: {self.kind.next_command(config.out_dir)}')
        finally:
            self.state.leave_ranks()
            if self.folder is not None:
                self.folder.close()

    def open_folder(self, say: Callable[[str], None]) -> bool:
        """Resume the run in the folder, or begin one, as init_from says. Returns whether there is something to do."""
        config, options = self.config, dataclasses.asdict(self.config)
        if config.init_from == 'resume':
            path = self.folder.latest(say) if self.folder is not None else None
            if self.runtime.world_size > 1:
                distributed.barrier()  # a damaged file has been put aside
            self.resume(path or latest_checkpoint(config.out_dir, say), say)
            if self.is_finished():
                say(f'the run in {config.out_dir} is finished: it has done {counted(self.iteration, "iteration")} and '
                    f'max_iters is {config.max_iters}; raise it to go on (--max_iters={2 * self.iteration})')
                return False
            if self.folder is not None:
                self.folder.write_description(options)
        elif self.folder is not None:
            self.folder.begin(options, config.overwrite)
        return True

    def is_finished(self) -> bool:
        """Whether the resumed run has done all iterations and validated the last; all ranks agree."""
        finished = self.folder is not None and self.iteration >= self.config.max_iters and any(
            record.get('kind') == 'evaluation' and record['iteration'] == self.iteration
            for record in read_metrics(self.folder.place(METRICS)))
        return self.runtime.total_count(int(finished)) > 0

    def loop(self) -> None:
        """Evaluate at every eval_interval and at the end, and take steps in between. When asked to stop, save first."""
        config = self.config
        while True:
            if self.iteration % config.eval_interval == 0 or self.iteration == config.max_iters:
                self.evaluate(save=self.iteration > 0)
            if self.iteration >= config.max_iters:
                return
            try:
                self.step()
            except Exception as error:
                if self.asked_to_stop is None or not is_compile_error(error):
                    raise
                self.stop()  # the signal reached the compiler too; no weight has moved
            if self.stop_wanted():
                self.stop()

    def stop(self) -> NoReturn:
        """Save the state after the last whole step, and end as the signal asks."""
        if self.iteration > 0:
            self.save()
            self.logger.message(f'stopped after iteration {self.iteration}; go on with --init_from=resume')
        else:
            self.logger.message('stopped before the first iteration was done; nothing was saved')
        raise SystemExit(128 + (self.asked_to_stop or signal.SIGTERM))

    def step(self) -> None:
        """One iteration, and its line where it is due."""
        config, start = self.config, time.perf_counter()
        learning_rate = learning_rate_at(self.iteration, learning_rate=config.learning_rate, min_lr=config.min_lr,
                                         warmup_iters=config.warmup_iters, lr_decay_iters=config.lr_decay_iters,
                                         decay_lr=config.decay_lr)
        stage = stage_at(self.model_config, self.iteration)
        self.announce(stage)
        losses = training_step(self.state, self.iteration, learning_rate)
        due = self.iteration % config.log_interval == 0 or self.iteration == config.max_iters - 1
        if due:
            self.runtime.synchronize()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.unprinted = [*self.unprinted, seconds]
        if due and self.runtime.is_writer:
            self.logger.iteration(self.record(losses, stage, learning_rate))
        if due:
            self.unprinted = []
            self.report_skipped()
        self.iteration += 1
        self.logger.advance(self.iteration)

    def announce(self, stage: Stage) -> None:
        """If other parts train from here on, say which, and that the stage is compiled first."""
        parts = frozenset(stage.heads), stage.trunk
        if parts == self.parts:
            return
        self.parts, told = parts, []
        if heads_of(self.model_config):
            names = ['trunk'] * stage.trunk + [head.title for head in HEADS if head.name in stage.heads]
            told.append(f'from iteration {self.iteration} on: {", ".join(names)}')
        if self.runtime.compile:
            told.append(f'compiling this stage, about {COMPILING_SECONDS} s')
        if told:
            self.logger.message('; '.join(told))

    def record(self, losses: Losses, stage: Stage, learning_rate: float) -> IterationRecord:
        """The record of the step just made: its losses, and means over the iterations since the last line."""
        rows = self.state.plan.rows
        parts = {name: loss.item() for name, loss in (('main', losses.main), *losses.heads.items())}
        weights = {head.name: stage.heads[head.name] for head in HEADS
                   if head.weight is not None and head.name in stage.heads}
        weights |= {'kl': self.config.kl_weight} if 'kl' in parts else {}
        further = {} if losses.sums is None else self.training.metrics(losses.sums)
        mean, tokens = sum(self.unprinted) / len(self.unprinted), rows.global_batch * self.config.block_size
        moment = Moment(self.iteration, self.state, stage, losses)
        for gauge in GAUGES.values():
            further |= gauge(moment)
        operations = self.state.model.operations_per_token() * self.training.passes(self.config) * tokens
        mfu = operations / mean / self.matrix_rate / rows.world_size
        return IterationRecord(self.iteration, losses.total.item(), parts, learning_rate, mean, mfu, tokens / mean,
                               weights, {f'train/{name}': value for name, value in further.items()})

    def report_skipped(self) -> None:
        """Say how many steps were skipped since the last such line. UserError if too many were skipped in a row."""
        config, skipped = self.config, self.state.guard.skipped()
        if skipped.total > self.skips_told:
            self.logger.message(f'iter {self.iteration}: {skipped.total - self.skips_told} more skipped '
                                f'({skipped.total} in all), as loss or gradient was not finite'
                                f'{" or a spike" if config.skip_spikes > 0 else ""}')
            self.skips_told = skipped.total
        if skipped.in_a_row < MOST_IN_A_ROW:
            return
        cure = f'go on from {Path(config.out_dir) / LATEST} with --init_from=resume' if self.has_saved else \
            'start again, as nothing was saved'
        raise UserError(f'the last {skipped.in_a_row} steps until iteration {self.iteration} were skipped (at most '
                        f'{MOST_IN_A_ROW - 1} in a row are borne): training diverged; lower learning_rate '
                        f'({config.learning_rate}) or grad_clip ({config.grad_clip}) and {cure}')

    def validate(self) -> Validation:
        """Validate the averaged weights; a head that has not begun to train has no loss."""
        config = self.config
        held_out = HeldOut(self.corpus, self.runtime, config.eval_iters * config.batch_size, config.batch_size)
        with gathered(self.state.averaged):
            found = self.training.validate(self.state.averaged, held_out, self.allowed, self.state.plan.noise)
        untrained = {f'loss_{head.name}' for head in HEADS if not head.has_begun(self.model_config, self.iteration)}
        return dataclasses.replace(found, further={name: value for name, value in found.further.items()
                                                   if name not in untrained})

    def evaluate(self, save: bool) -> None:
        """Validate the averaged weights, print a sample of them, and save the latest and maybe the best."""
        config, state = self.config, self.state
        found = self.validate()
        key = self.training.value
        self.logger.evaluation(self.iteration, found.line(f'step {self.iteration}: val {key}'), {
            f'val/{key}': found.value, f'val/{key}_standard_error': found.standard_error,
            **{f'val/{name}': value for name, value in found.further.items()}, 'train_seconds': self.seconds})
        if not math.isfinite(found.value):
            raise UserError(f'validation at iteration {self.iteration} gives {found.value}: training diverged and was '
                            f'not saved; lower learning_rate ({config.learning_rate}) or grad_clip '
                            f'({config.grad_clip}) and start again'
                            + (f', or go on from what {config.out_dir} holds' if self.has_saved else ''))
        if self.iteration > 0 and config.sample_length > 0 and self.kind.writes_text:
            trained = stage_at(self.model_config, self.iteration - 1)
            with gathered(state.averaged):
                if self.runtime.is_writer:
                    self.logger.sample(self.iteration, preview(state.averaged, self.corpus.vocabulary, self.allowed,
                                               SAMPLER.name in trained.heads,
                                               min(config.sample_length, config.block_size), config.seed))
        if save:
            self.save(is_best=self.improves(found))
        if time.monotonic() - self.drawn > SECONDS_BETWEEN_CURVES and self.folder is not None and \
                not self.folder.replaces:
            self.draw_curve(lambda line: None)
            self.drawn = time.monotonic()

    def improves(self, found: Validation) -> bool:
        """Whether this becomes the best checkpoint: the lowest value is best. Once there are checkpoints from after the
        schedules of all heads, only these count. A value whose checkpoint file is missing does not count."""
        is_final = self.iteration >= all_heads_trained_from(self.model_config)
        missing = self.runtime.total_count(int(self.folder is not None and not self.folder.has_best())) > 0
        better = missing or self.best_value is None or found.deciding < self.best_value
        if better or (is_final and not self.best_is_final):
            self.best_value, self.best_is_final = found.deciding, is_final
            return True
        return self.config.always_save_checkpoint

    def save(self, is_best: bool = False) -> None:
        """Save the latest state; also as the best one if it is, and as a snapshot if one is due."""
        config, due = self.config, self.iteration % self.config.eval_interval == 0
        weights = self.checkpoint(with_optimizers=False) if is_best or due else None
        latest = self.checkpoint(with_optimizers=True)
        if self.folder is not None:
            aside = self.folder.save(latest, weights if is_best else None, weights if due else None, run_label(config),
                                     config.keep_snapshots)
            if aside is not None:
                self.logger.message(f'the earlier run of {config.out_dir} is now in {aside}')
            self.logger.record_in(self.folder.place(METRICS))
        self.has_saved = True

    def checkpoint(self, with_optimizers: bool) -> Checkpoint:
        """The run's whole state now. Without optimizers it holds the averaged weights only, which is enough to sample.

        All ranks must call this, since each may hold a part. Only the writing rank's result is whole.
        """
        state, corpus, keep = self.state, self.corpus, self.runtime.is_writer
        averaged = whole_weights(state.averaged, keep)
        return Checkpoint(
            kind=str(self.kind), model_config=model_config_to_dict(self.model_config),
            config=dataclasses.asdict(self.config), vocabulary=corpus.vocabulary.to_meta(),
            vocabulary_hash=corpus.vocabulary.hash, data_hash=corpus.data_hash, data_sizes=dict(corpus.sizes),
            model=whole_weights(state.model, keep) if with_optimizers else averaged, iteration=self.iteration,
            ema=averaged if with_optimizers else None,
            optimizers=[whole(one.state_dict(), keep) for one in state.optimizers] if with_optimizers else [],
            scaler=state.scaler.state_dict() if with_optimizers and state.scaler.is_enabled() else None,
            guard=state.guard.state_dict() if with_optimizers else None,
            best_value=self.best_value, extra={'best_is_final': self.best_is_final, 'train_seconds': self.seconds,
                                               'read': self.read, 'resumable': with_optimizers,
                                               'wandb_id': self.wandb_id, 'text_figures': self.text_figures})

    def resume(self, path: Path, say: Callable[[str], None]) -> None:
        """Take up the checkpoint at `path`; the run goes on exactly as if never stopped. A line names every option that
        has changed."""
        mesh = self.state.mesh
        saved = load_checkpoint(path, exact_device(self.runtime.device) if mesh is None else 'cpu')
        if saved.kind != self.kind:
            raise UserError(f'{path} is of kind {saved.kind!r}, but the options describe one of kind {self.kind!r}; '
                            f'resume with the options that it was trained with')
        if (saved.config.get('training_type') == GRPO) != (self.config.training_type == GRPO):
            raise UserError(f'{path} was trained with training_type={saved.config.get("training_type")}, but now it is '
                            f'{self.config.training_type}; resume with the old one, or begin a run of its own with '
                            f'--init_from_checkpoint={path} and another --out_dir')
        for note in check_resume(saved, model_config_to_dict(self.model_config), self.corpus.vocabulary.hash,
                                 self.corpus.data_hash, force=self.config.force_resume,
                                 dataset=self.config.dataset):
            say(note)
        before, now = saved.config, dataclasses.asdict(self.config)
        replaced = [] if self.config.force_resume else [
            name for name, digest in saved.extra.get('read', {}).items()
            if before[name] == now[name] and digest != self.read.get(name, digest)]
        raise_problems([f'{name} is {now[name]}, but that file was replaced since the run was saved; bring the old one '
                        f'back, or add --force_resume=True to go on with the new one' for name in replaced])
        for name in TRAJECTORY:
            if name in before and before[name] != now[name]:
                say(f'{name} was {before[name]} and is now {now[name]}')
        if before['optimizer'] != now['optimizer']:
            raise UserError(f'{path} was trained with optimizer={before["optimizer"]}, whose state '
                            f'{now["optimizer"]} cannot use; take --optimizer={before["optimizer"]}')
        state = self.state
        model, averaged, optimizers = (one if mesh is None else cut(one, mesh)
                                       for one in (saved.model, saved.ema, saved.optimizers))
        load_weights(state.model, model, path)
        load_weights(state.averaged, averaged, path)
        for optimizer, values in zip(state.optimizers, optimizers, strict=True):
            asked = [{key: group[key] for key in ('lr', 'capturable', 'weight_decay', 'betas') if key in group}
                     for group in optimizer.param_groups]
            optimizer.load_state_dict(values)
            for group, hyperparameters in zip(optimizer.param_groups, asked):
                group.update(hyperparameters)
        if saved.scaler is not None:
            state.scaler.load_state_dict(saved.scaler)
        if saved.guard is not None:
            state.guard.load_state_dict(saved.guard)
            self.skips_told = state.guard.skipped().total
        self.iteration, self.best_value, self.has_saved = saved.iteration, saved.best_value, True
        self.best_is_final, self.seconds = saved.extra['best_is_final'], saved.extra['train_seconds']
        self.wandb_id = saved.extra.get('wandb_id')
        say(f'going on from {path} after iteration {self.iteration}')

    def on_signal(self, number: int, frame: object) -> None:
        """Finish the step, save, stop; a second interrupt stops at once."""
        if self.asked_to_stop is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked_to_stop = signal.Signals(number)
        complain('stopping after this step, once it is saved; interrupt again to stop at once')

    def stop_wanted(self) -> bool:
        """Whether any rank was asked to stop; all agree."""
        return self.runtime.total_count(int(self.asked_to_stop is not None)) > 0

    def draw_curve(self, say: Callable[[str], None] = say_if_heard) -> None:
        """The loss curve as a picture."""
        path = Path(self.config.out_dir)
        if not optional('there is no loss curve', lambda: read_metrics(path / 'metrics.jsonl')):
            return
        borders = {head.title: head.start(self.model_config) for head in heads_of(self.model_config)}
        plot_loss_curve(path / 'metrics.jsonl', path / 'loss.png', say, stage_borders=borders,
                        unit=self.training.unit)
