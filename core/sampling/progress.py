"""What the terminal shows of a run while it goes on: progress bar or animation, and the verbose lines."""

from collections.abc import Callable

from torch import Tensor

from core.common.printing import complain
from core.common.progress import ProgressBar
from core.data.vocabulary import Vocabulary
from core.sampling.animation import TerminalAnimation
from core.sampling.options import SampleConfig
from core.sampling.trace import Trace, TraceStep

PREVIEW = 100  # characters of a preview


class Progress:
    """The terminal's reader of a run's steps: progress bar or animation, verbose lines; feeds the trace as well."""

    def __init__(self, config: SampleConfig, vocabulary: Vocabulary, batches: int, blocks: int, trace: Trace | None,
                 animation: TerminalAnimation | None, say: Callable[[str], None]) -> None:
        self.config, self.vocabulary, self.trace, self.say = config, vocabulary, trace, say
        self.animation = animation
        self.bar_wanted = config.show_progress and animation is None
        self.wanted = (self.bar_wanted or trace is not None or animation is not None or config.use_verbose_logging
                       or config.log_debug)
        self.batches, self.blocks, self.batch, self.last = batches, blocks, 0, None
        self.bar: ProgressBar | None = None

    def __enter__(self) -> 'Progress':
        if self.bar_wanted:
            self.bar = ProgressBar(1.0, desc='sampling', tell=complain,
                                   bar_format='{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}')
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def begin_batch(self, first: int, protected: Tensor) -> None:
        """The next batch has the samples from number `first` on, with protected bool [B, L] on the CPU."""
        if self.trace is not None:
            self.trace.add_rows(protected)
        if self.animation is not None:
            self.animation.show_rows(first, protected)

    def see(self, step: TraceStep) -> None:
        """A `Watch`."""
        if self.trace is not None:
            self.trace.add(step)
        done = (step.window + (step.step + (step.event != 'start')) / step.steps) / self.blocks if step.steps else 1.0
        self._move((self.batch + done) / self.batches)
        self.log_iteration_progress(step)
        if self.animation is not None:
            self.animation(step)

    def end_batch(self) -> None:
        """All windows of a batch are written; a run that ended early moves the bar the rest of the way."""
        if self.config.use_verbose_logging and self.last is not None:
            self.say_line(f'last preview: {self._preview(self.last)}')
        self.batch += 1
        self._move(self.batch / self.batches)

    def log_iteration_progress(self, step: TraceStep) -> None:
        """Mask shares, the first preview, and with log_debug a line per step."""
        masked = (step.tokens == self.vocabulary.mask_token_id).float().mean()
        if self.config.log_debug:
            mean = step.confidence[step.changed].mean() if step.event == 'predict' and step.changed.any() else None
            self.say_line(f'block {step.window} step {step.step} {step.event}: {int(step.changed.sum())} positions '
                      f'changed, {masked:.1%} masked' + ('' if mean is None else f', mean log-probability {mean:.3f}'))
        elif self.config.use_verbose_logging:
            self.say_line(f'block {step.window} step {step.step} {step.event}: {masked:.1%} masked')
        if self.config.use_verbose_logging and step.event == 'predict' and step.step == 0:
            self.say_line(f'first preview: {self._preview(step)}')
        self.last = step

    def _preview(self, step: TraceStep) -> str:
        return repr(self.vocabulary.decode(step.tokens[0].tolist())[:PREVIEW])

    def say_line(self, line: str) -> None:
        """Say a line without disturbing what is shown."""
        if self.animation is not None:
            self.animation.clear()
        if self.bar is not None:
            self.bar.clear()
        self.say(line)

    def _move(self, share: float) -> None:
        if self.bar is not None:
            self.bar.move_to(share)
