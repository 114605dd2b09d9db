"""What a sampling run did, step by step: the one record that the terminal, the page, the picture, the JSON file and the
statistics read.

Letters: B rows, L sequence length, T window length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Event = Literal['start', 'predict', 'remask']


class TraceStep(NamedTuple):
    """What one step did to a window of some rows.

    window: its number; start: its first position; step: of the window, from 0; steps: the most it can have;
    event: 'start', 'predict' or 'remask'; rows int64 [B]: the samples' numbers; tokens int64 [B, T] after the event;
    changed bool [B, T]: drawn by a prediction, or remasked; confidence float64 [B, T]: log-probability of each token
    when it was drawn. On the CPU.
    """

    window: int
    start: int
    step: int
    steps: int
    event: Event
    rows: Tensor
    tokens: Tensor
    changed: Tensor
    confidence: Tensor


Watch = Callable[[TraceStep], None]


@dataclass
class Trace:
    """A sampling run step by step: the one record that the terminal, the JSON file and the statistics read.

    protected bool [samples, L]; settings: the run's options in built-in types.
    """

    settings: dict[str, Any]
    protected: Tensor
    steps: list[TraceStep] = field(default_factory=list)

    def add(self, step: TraceStep) -> None:
        """Append a step; a `Watch`."""
        self.steps.append(step)

    def add_rows(self, protected: Tensor) -> None:
        """The samples of the next batch begin, with protected bool [B, L]."""
        self.protected = torch.cat((self.protected, protected))

    def cut(self, samples: int) -> None:
        """Forget all samples but the first `samples`."""
        self.protected = self.protected[:samples]
        self.steps = [step for step in self.steps if int(step.rows[0]) < samples]

    def alone(self) -> 'Trace':
        """The run of the first sample."""
        steps = [step._replace(rows=step.rows[:1], tokens=step.tokens[:1], changed=step.changed[:1],
                               confidence=step.confidence[:1]) for step in self.steps if int(step.rows[0]) == 0]
        return Trace(self.settings, self.protected[:1], steps)

    def to_builtins(self, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """The run in built-in types for JSON; changed positions are indices into the window, confidence is in nats."""
        return {'settings': self.settings, 'protected': [row.nonzero().squeeze(1).tolist() for row in self.protected],
                'steps': [{'window': step.window, 'start': step.start, 'step': step.step, 'event': step.event,
                           'samples': [{'sample': row, 'text': decode(tokens), 'tokens': tokens,
                                        'changed': changed.nonzero().squeeze(1).tolist(),
                                        'confidence': [round(value, 4) for value in confidence]}
                                       for row, tokens, changed, confidence in zip(
                                           step.rows.tolist(), step.tokens.tolist(), step.changed,
                                           step.confidence.tolist())]}
                          for step in self.steps]}
