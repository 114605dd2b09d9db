"""Which training steps are taken: those whose loss and gradients are finite and, if the user asks for it, no spike.

The verdict is computed on the device, and the optimizers obey it there, so a step never waits for it. The host reads
the counts when it has to wait anyway. All ranks see the same total loss and the same averaged gradients, so they
agree.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core.common.precision import exact_device, to_exact

WINDOW = 128  # earlier iterations to compare with; half of them must exist (as in OLMo-core's SkipStepAdamW)
MOST_IN_A_ROW = 30  # more than the 16 halvings that float16's loss scale may need when a run begins


class Skipped(NamedTuple):
    """Steps that were not taken: in all, and in a row until now."""

    total: int
    in_a_row: int


class StepGuard:
    """Judges each step's loss and gradient norms, and counts the steps that were not taken.

    spike_deviations: a loss or norm further than this many standard deviations above the mean of the last 128
    iterations is refused too; 0 refuses only what is not finite.
    """

    def __init__(self, device: torch.device, spike_deviations: float) -> None:
        self.spike_deviations = spike_deviations
        self.device, exact = device, exact_device(device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=exact)  # as in Skipped
        self.recent = torch.full((2, WINDOW), torch.nan, dtype=torch.float64, device=exact)  # losses and norms

    def refuses(self, iteration: int, loss: Tensor, norm: Tensor, *others: Tensor) -> Tensor:
        """float32 scalar on the device: 1 where the step must not be taken, 0 where it may.

        loss and norm are compared with their recent values; `others` need only be finite. All are scalars.
        """
        latest = to_exact(torch.stack((loss, norm))).double()
        refused = ~(latest.sum() + sum(to_exact(one) for one in others)).isfinite()
        if self.spike_deviations > 0:
            refused = refused | self._is_spike(latest)
            self.recent[:, iteration % WINDOW] = latest.where(latest.isfinite(), torch.nan)
        self.counts.copy_(torch.stack((self.counts[0] + refused, (self.counts[1] + 1) * refused)))
        return refused.float().to(self.device)

    def _is_spike(self, latest: Tensor) -> Tensor:
        """bool scalar: whether either of `latest` [2] is far above the recent values, which include earlier spikes."""
        enough = self.recent.isfinite().sum(1) >= WINDOW // 2
        mean = self.recent.nanmean(1)
        deviation = (self.recent - mean[:, None]).square().nanmean(1).sqrt()
        return (enough & (latest > mean + self.spike_deviations * deviation)).any()

    def skipped(self) -> Skipped:
        """The counts, on the host: waits for the device."""
        return Skipped(*self.counts.tolist())

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to judge in the same way."""
        return {'counts': self.counts.clone(), 'recent': self.recent.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The reverse of `state_dict`."""
        self.counts, self.recent = (state[name].to(self.counts.device, copy=True) for name in ('counts', 'recent'))
