"""What a sampling policy sees and returns, and what policies share.

Letters: B rows, T window length, V vocabulary with the special ids, N positions picked out of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from core.common.choosing import computing_tolerance, highest_positions
from core.common.drawing import DrawRule, allowed_log_probabilities
from core.common.randomness import Purpose, RowRandom
from core.sampling.network import Network
from sample_utils import Fill, FillTask, Head, flat_positions, logits_in_parts

ROUNDING = 1e-9  # added before a count is cut to a whole number, so that a cosine of 1/2 counts as one
_KEYS, _TIES = 1, 2  # streams of random numbers; stream 0 of Purpose.ORDER deals self-confidence's groups


class Open(NamedTuple):
    """The masked positions that a step may fill.

    tokens int64 [B, T]; positions bool [B, T]; count: how many these are, None if the host does not know; rows int64
    [R]: the rows that have any, None for every row.
    """

    tokens: Tensor
    positions: Tensor
    count: int | None = None
    rows: Tensor | None = None


class Prediction:
    """What the network predicts for open positions: one trunk call, made at the first use.

    Logits are computed for the open positions only. A compiled network has fixed shapes, so its trunk computes every
    position. Another network, if the count is known, computes only the open positions in its last layer, and reads only
    rows that have any. Results are kept for this step, so nothing is computed twice. head: what fills.
    """

    def __init__(self, network: Network, open: Open, rule: DrawRule, generator: RowRandom, head: Head = 'none') -> None:
        self._network, self._open, self._rule, self._generator, self._head = network, open, rule, generator, head

    @property
    def tolerance(self) -> float:
        """Scores computed from the network's logits count as equal if they differ by no more than this."""
        return computing_tolerance(self._network.model.lm_head.weight)

    @cached_property
    def hidden_states(self) -> Tensor:
        """[B, T, D]: valid at the open positions; elsewhere only if the sampler head reads whole rows."""
        tokens, positions, count, rows = self._open
        if self._network.compiled or count is None or self._head != 'none' and self._network.model.config.reads_row:
            return self._network.encode(tokens)
        picked = within = flat_positions(positions, count)  # [N]
        read = tokens
        if rows is not None:
            read, within = tokens[rows], flat_positions(positions[rows], count)  # [R, T], [N]
        found = self._network.encode(read, positions=within)  # [N, D]
        hidden = found.new_zeros(tokens.numel(), found.size(-1))  # [B T, D]
        hidden = hidden.index_copy_(0, picked.to(found.device), found)
        return hidden.view(*tokens.shape, -1)

    @cached_property
    def candidates(self) -> Fill:
        """A token for every open position, drawn independently from the step's random numbers. A position that is then
        revealed without the sampler head gets this token."""
        return self._network.filler('none').fill(self._task(self._open.positions, self._open.count))

    def fill(self, positions: Tensor, count: int | None = None, truth: Tensor | None = None) -> Fill:
        """Fill the open `positions` bool [B, T]; count: their number, if known; truth: see `FillTask`.

        The sampler head fills them if there is one. Otherwise tokens are independent: the candidates, if those were
        drawn.
        """
        if self._head != 'none' or truth is not None or 'candidates' not in self.__dict__:
            return self._network.filler(self._head).fill(self._task(positions, count, truth))
        made = self.candidates
        return Fill(torch.where(positions, made.tokens, self._open.tokens),
                    torch.where(positions, made.log_probabilities, 0.0),
                    torch.where(positions, made.confidence, 0.0), positions, None)

    def _task(self, positions: Tensor, count: int | None, truth: Tensor | None = None) -> FillTask:
        return FillTask(self._open.tokens, self.hidden_states, self._rule, self._generator, positions, count,
                        truth=truth, left_context=self._network.left_context)

    def measure(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """float64 [B, T]: `of` maps log-probabilities [N, V] (temperature 1, nothing cut) of the open positions to
        numbers [N]; 0 elsewhere."""
        picked = flat_positions(self._open.positions, self._open.count)  # [N]
        found = torch.zeros(self._open.tokens.numel(), dtype=torch.float64, device=picked.device)
        for part, logits in logits_in_parts(self._network.model, self.hidden_states, picked):
            found = found.index_put((part,), of(allowed_log_probabilities(logits, self._rule.allowed)))
        return found.view(self._open.tokens.shape)


@dataclass(frozen=True)
class PolicyView:
    """What a policy sees at one step of a window, or of one block of it.

    step: 0, 1, ...
    tokens int64 [B, T].
    protected bool [B, T]: positions that never change (prompt, carried context, other blocks). All others were masked
    at step 0.
    left int64 [B, 1]: how many masked positions each row has after this step, by the policy's own `left`; or None.
    generator: the rows' random numbers.
    prediction: the network's, of the tokens before this step's draws.
    revealed bool [B, T]: filled in this step; all False when `reveal` is called.
    confidence float64 [B, T]: each token's log-probability when it was drawn.
    critic: a counted network call that gives the wrongness [B, T] of `tokens`; None without a critic.
    """

    step: int
    tokens: Tensor
    protected: Tensor
    mask_token_id: int
    left: Tensor | None
    generator: RowRandom
    prediction: Prediction
    revealed: Tensor
    confidence: Tensor
    critic: Callable[[], Tensor] | None

    @property
    def masked(self) -> Tensor:
        """bool [B, T]: the masked positions that are not protected."""
        return (self.tokens == self.mask_token_id) & ~self.protected

    @property
    def settled(self) -> Tensor:
        """bool [B, T]: the unprotected positions that were revealed before this step and still are."""
        return (self.tokens != self.mask_token_id) & ~self.protected & ~self.revealed

    @property
    def share(self) -> Tensor:
        """int64 [B, 1]: how many masked positions each row reveals now, by the policy's own `left`."""
        return self.masked.sum(1, keepdim=True) - self.left

    @property
    def size(self) -> Tensor:
        """int64 [B, 1]: how many positions each row was asked to fill."""
        return (~self.protected).sum(1, keepdim=True)

    def keys(self) -> Tensor:
        """float64 [B, T] in (0, 1): for a policy's own random choice of positions to reveal."""
        return self.generator.uniform(Purpose.ORDER, self.tokens.size(1), _KEYS)

    def remasking_keys(self) -> Tensor:
        """float64 [B, T] in (0, 1): for a random choice of positions to remask."""
        return self.generator.uniform(Purpose.REMASK, self.tokens.size(1))

    def highest(self, score: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
        """bool [B, T]: in each row the `count` [B, 1] eligible positions of highest score. Random keys decide between
        scores that count as equal (core/common/choosing.py). A score's slope in the network's logits must be at most
        about 1."""
        return highest_positions(score, self._ties(), eligible, count, self.prediction.tolerance)

    def drawn_by_lot(self, count: Tensor) -> Tensor:
        """bool [B, T]: in each row `count` [B, 1] of the masked positions, those of highest `keys`."""
        return highest_positions(self.keys(), self._ties(), self.masked, count, 0)

    def _ties(self) -> Tensor:
        return self.generator.uniform(Purpose.ORDER, self.tokens.size(1), _TIES)


@dataclass(frozen=True)
class Policy:
    """How positions are revealed and masked again.

    limit: the most trunk calls, given the most masked positions of a row; it must not fall as they grow.
    reveal: the positions to fill after the trunk call, bool [B, T]; None: every masked one.
    remask: the positions to mask again; not called after the last step.
    left: how many of the n positions that a row was asked to fill are masked after step i. Then the host knows every
    count and never waits for the device. None: chance or the network decides, and the host counts once a step.
    asks: a row without masks is finished and not remasked again; when all rows are finished, the run ends.
    idles: the choice to reveal does not depend on the network, so if it is empty there is no trunk call.
    """

    limit: Callable[[int], int]
    reveal: Callable[[PolicyView], Tensor | None]
    remask: Callable[[PolicyView], Tensor] | None = None
    left: Callable[[int, int], int] | None = None
    asks: bool = False
    idles: bool = False


class Counts:
    """A policy's `left` for the rows of one block, which must fill sizes [B] positions: the counts that host and device
    know before the block begins."""

    def __init__(self, policy: Policy, sizes: Sequence[int], device: torch.device | str) -> None:
        self.limit = policy.limit(max(sizes))
        self._after = self._left = None
        if policy.left is not None:
            of_size = {size: [policy.left(step, size) for step in range(self.limit)] for size in set(sizes)}
            self._after = [[of_size[size][step] for size in sizes] for step in range(self.limit)]
            self._left = torch.tensor([of_size[size] for size in sizes], device=device).T.unsqueeze(2)  # [limit, B, 1]

    def after(self, step: int) -> list[int] | None:
        """How many masked positions each row has left after `step`; None if the policy does not know."""
        return None if self._after is None else self._after[step]

    def view(self, step: int) -> Tensor | None:
        """`PolicyView.left` of this step."""
        return None if self._left is None else self._left[step]


def equal_shares(iterations: int) -> Callable[[int, int], int]:
    """A policy's `left` for n positions in `iterations` equal shares: n // iterations each, and one more in the first
    n % iterations steps. With more steps than positions, one each."""
    def left(step: int, size: int) -> int:
        return size - (step + 1) * (size // iterations) - min(step + 1, size % iterations)

    return left


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise of uniform numbers in (0, 1), float64. It orders positions here and never draws a token."""
    return -torch.log(-torch.log(uniform))
