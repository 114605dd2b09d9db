"""What a training run reports: console lines, `metrics.jsonl`, Weights & Biases and the progress bar.

`metrics.jsonl` is always written, and reads as one run however often the run was stopped and resumed. Weights & Biases
is optional and can never stop a run. Only rank 0 reports.
"""

import json
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.common.files import write_whole
from core.common.printing import optional, say_if_heard
from core.common.progress import ProgressBar

METRICS_NAME = 'metrics.jsonl'
WANDB_FAILURES_BORNE = 5  # consecutive log calls that may fail; then the rest of the run goes without W&B
WANDB_SECONDS = 60  # the longest wait for W&B to begin or to finish


@dataclass(frozen=True)
class IterationRecord:
    """One training iteration. A part of the loss whose stage has not begun is neither printed nor logged."""

    iteration: int
    loss: float  # nats, as trained on: main + sampler + alpha * critic
    parts: Mapping[str, float]  # of the loss by their names: 'main', and those of the heads that train
    learning_rate: float
    seconds: float  # of this iteration
    mfu: float | None = None  # share of the peak matrix rate, 0..1; None while not known
    tokens_per_second: float | None = None  # of all ranks together; None while not known
    weights: Mapping[str, float] = field(default_factory=dict)  # of parts that count in the loss with a weight
    extra: Mapping[str, float] = field(default_factory=dict)  # for the log only, such as 'train/grad_norm'

    def line(self) -> str:
        """The console line, whose parts add up: 'iter N: loss a (main b, sampler c, critic 0.5 x d), time 1.00ms, mfu
        2.00%, 3,000 tokens/s'."""
        weights = {name: f'{weight:.4g} x ' for name, weight in self.weights.items()}
        shown = ', '.join(f'{name} {weights.get(name, "")}{value:.4f}' for name, value in self.parts.items())
        mfu = '' if self.mfu is None else f', mfu {100 * self.mfu:.2f}%'
        rate = f', {self.rate()}' if self.rate() else ''
        return f'iter {self.iteration}: loss {self.loss:.4f} ({shown}), time {1000 * self.seconds:.2f}ms{mfu}{rate}'

    def rate(self) -> str:
        """'3,000 tokens/s', or nothing while that is not known."""
        return '' if self.tokens_per_second is None else f'{self.tokens_per_second:,.0f} tokens/s'

    def numbers(self) -> dict[str, float]:
        """The keys of `metrics.jsonl` and W&B; inactive parts are absent."""
        parts = {f'train/loss_{name}': value for name, value in self.parts.items()}
        parts |= {f'train/{name}_alpha': weight for name, weight in self.weights.items()}
        mfu = {} if self.mfu is None else {'mfu': self.mfu}
        rate = {} if self.tokens_per_second is None else {'train/tokens_per_second': self.tokens_per_second}
        return {'train/loss': self.loss, **parts, 'lr': self.learning_rate, 'seconds': self.seconds, **mfu, **rate,
                **self.extra}


class RunLogger:
    """Prints and records everything of one training run, in `metrics` (`folder`/metrics.jsonl by default).

    wandb_id: of the W&B run to continue, None for a new one; the attribute of that name is the id to keep. With
    `enabled=False` (ranks above 0) nothing happens.
    """

    def __init__(self, folder: Path, *, wandb_log: bool, project: str, run_name: str, config: dict[str, Any],
                 start_iteration: int, total_iterations: int, enabled: bool, metrics: Path | None = None,
                 wandb_id: str | None = None) -> None:
        self._enabled = enabled
        self._bar: ProgressBar | None = None
        self._wandb: _WandbRun | None = None
        self._metrics: _MetricsFile | None = None
        self.wandb_id = wandb_id
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        metrics = metrics or folder / METRICS_NAME
        rewind_metrics(metrics, start_iteration)
        self._metrics = _MetricsFile(metrics, self.message)
        if wandb_log:
            self.wandb_id = wandb_id or secrets.token_hex(4)
            self._wandb = _WandbRun(folder, project, run_name, config, self.wandb_id, self.message)
        self._bar = ProgressBar(total_iterations, initial=start_iteration, unit='it', dynamic_ncols=True,
                                smoothing=0.05, desc='training', tell=self.message)

    def iteration(self, record: IterationRecord) -> None:
        """Print and record one training iteration; the caller decides which."""
        self.message(record.line())
        if self._bar is not None:
            self._bar.note(record.rate())
        self._record('iteration', record.iteration, record.numbers())

    def evaluation(self, iteration: int, line: str, numbers: Mapping[str, float]) -> None:
        """Print `line` and record `numbers`, whose keys are W&B's: 'val/nelbo' in nats per token, and so on."""
        self.message(line)
        self._record('evaluation', iteration, numbers)

    def sample(self, iteration: int, text: str) -> None:
        """Print a sample of the model's text, indented, to tell it from the log; W&B gets it as a table."""
        self.message('\n'.join(f'  | {line}' for line in text.splitlines()))
        if self._wandb is not None:
            self._wandb.sample(text, iteration)

    def message(self, text: str) -> None:
        """Print a plain line to stdout without tearing the progress bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.clear()
        say_if_heard(text)

    def advance(self, iteration: int) -> None:
        """Move the progress bar to `iteration` finished iterations."""
        if self._bar is not None:
            self._bar.move_to(iteration)

    def record_in(self, path: Path) -> None:
        """The metrics file is `path` from now on."""
        if self._metrics is not None:
            self._metrics.path = path

    def close(self) -> None:
        """Finish the progress bar, `metrics.jsonl` and W&B; may be called more than once."""
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _record(self, kind: str, iteration: int, numbers: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.append({'kind': kind, 'iteration': iteration, **numbers})
        if self._wandb is not None:
            self._wandb.log(dict(numbers), iteration)


# ---- metrics.jsonl


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl` in their order, without half-written lines; empty if there is no file."""
    return [record for _, record in _whole_lines(path)]


def rewind_metrics(path: Path, start_iteration: int) -> None:
    """Drop the records from `start_iteration` on, which the run will write again, and half-written lines; atomic."""
    if not path.exists():
        return
    kept = b''.join(line + b'\n' for line, record in _whole_lines(path) if record['iteration'] < start_iteration)
    if kept == path.read_bytes():
        return
    write_whole(path, kept)


def _whole_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b'\n'):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get('iteration')) is int:
            lines.append((line, record))
    return lines


class _MetricsFile:
    """Appends records to a file; a full disk is reported once and does not stop the run."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self._say = path, say
        self._failed = False

    def append(self, record: dict[str, Any]) -> None:
        plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                 for key, value in record.items()}  # JSON has no NaN
        line = json.dumps(plain, allow_nan=False).encode() + b'\n'
        try:
            with self.path.open('ab') as file:
                file.write(b'\n' + line if self._failed else line)  # the failed write may have left half a line
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._say(f'{self.path} cannot be written ({error.strerror}); training goes on without it')
            self._failed = True


# ---- Weights & Biases


class _WandbRun:
    """A W&B run whose failures, SystemExit among them, are reported in one line each and never raised."""

    def __init__(self, folder: Path, project: str, run_name: str, config: dict[str, Any], run_id: str,
                 say: Callable[[str], None]) -> None:
        self._say = say
        self._failures = 0
        self._wandb = wandb = optional(f'W&B is not available (pip install wandb), metrics go to {METRICS_NAME} only',
                                       _import_wandb, say)
        self._run = None if wandb is None else optional(
            f'W&B did not start (WANDB_MODE=offline keeps numbers for later), metrics go to {METRICS_NAME} only',
            lambda: self._start(folder, project, run_name, config, run_id), say)

    def _start(self, folder: Path, project: str, run_name: str, config: dict[str, Any], run_id: str) -> Any:
        """A new run of this id, or the earlier one of this id."""
        settings = self._wandb.Settings(init_timeout=WANDB_SECONDS, login_timeout=WANDB_SECONDS,
                                        finish_timeout=WANDB_SECONDS)
        run = self._wandb.init(project=project, name=run_name, config=config, dir=str(folder), settings=settings,
                               id=run_id, resume='allow')
        self._say(f"W&B: run '{run_name}' of project '{project}', {run.settings.mode}")
        return run

    def log(self, numbers: dict[str, float], iteration: int) -> None:
        """Numbers by their keys."""
        self._send('a record', lambda: numbers, iteration)

    def sample(self, text: str, iteration: int) -> None:
        """A text, as a table of one row."""
        self._send('a sample', lambda: {'sample': self._wandb.Table(columns=['iteration', 'text'],
                                                                    data=[[iteration, text]])}, iteration)

    def _send(self, what: str, made: Callable[[], dict[str, Any]], iteration: int) -> None:
        run = self._run
        if run is None:
            return
        taken = optional(f'W&B did not take {what}', lambda: (run.log(made(), step=iteration),), self._say)
        self._failures = 0 if taken else self._failures + 1
        if self._failures >= WANDB_FAILURES_BORNE:
            self._say(f'W&B failed {self._failures} times in a row and is left; metrics go to {METRICS_NAME} only')
            self.finish()

    def finish(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            optional(f'W&B did not finish ({METRICS_NAME} has every number)', run.finish, self._say)


def _import_wandb() -> Any:
    import wandb

    return wandb
