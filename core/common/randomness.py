"""Random numbers by counter: a number depends on (seed, iteration, global row, purpose, column) and on nothing else.

So the numbers do not depend on micro-steps, ranks or resumes, on evaluation and sampling in between, or on the batch
around a row. The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
written with 64-bit integer tensor operations, so a CPU and a GPU give the same numbers.

Letters: B rows, W columns asked for.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from core.common.precision import exact_device, to_exact

_LOW_32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # the key's increments per round
_ROUNDS = 10
_APART = 0x9E3779B97F4A7C15  # odd, so that multiples of it below 2^64 are all different


class Purpose(IntEnum):
    """What a stream of numbers is for; two purposes never share a number. Values are part of a run's identity."""

    DATA = 1        # which windows of the corpus a row reads
    TIME = 2        # the shared offset of the low-discrepancy times
    MASK = 3        # which positions are masked, and with which token a position is replaced
    NEIGHBOUR = 4   # which masked neighbours the sampler head sees
    CRITIC_FILL = 5  # draws that fill the masks for the critic
    DROPOUT = 6
    VALIDATION = 7  # number and choice of masked positions in validation
    TOKEN = 8       # draws of tokens while sampling
    BOOTSTRAP = 9   # ties between equally likely bootstrap positions
    REMASK = 10     # which positions are remasked
    ORDER = 11      # reveal orders
    PLACEMENT = 12  # where a prompt is put
    REINFORCEMENT = 13  # the seed of the texts that one iteration of a policy gradient draws
    VERIFY = 14     # which drafted tokens are accepted, and what replaces the first that is not


def philox4x32(counters: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 of `counters` [..., 4] (int64 holding 32-bit words) under `key`; returns words [..., 4]."""
    word0, word1, word2, word3 = counters.unbind(-1)
    key0, key1 = key
    for _ in range(_ROUNDS):
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]  # wraps modulo 2^64, as it should
        high0, high1 = (product0 >> 32) & _LOW_32, (product1 >> 32) & _LOW_32
        word0, word1, word2, word3 = (
            high1 ^ word1 ^ key0, product1 & _LOW_32, high0 ^ word3 ^ key1, product0 & _LOW_32)
        key0, key1 = (key0 + _WEYL[0]) & _LOW_32, (key1 + _WEYL[1]) & _LOW_32
    return torch.stack((word0, word1, word2, word3), dim=-1)


@dataclass(frozen=True)
class RowRandom:
    """The random numbers of some rows at one iteration (or sampling step).

    seed: any integer, taken modulo 2^64. iteration: 0 .. 2^32 - 1. rows: int64 [B], *global* row indices 0 .. 2^32 - 1.
    """

    seed: int
    iteration: int
    rows: Tensor

    def at(self, iteration: int) -> 'RowRandom':
        """The same rows at another iteration or step."""
        return replace(self, iteration=iteration)

    def apart(self, number: int) -> 'RowRandom':
        """The same rows at the same iteration, with different random numbers for each `number`. 0 changes nothing."""
        return replace(self, seed=self.seed + number * _APART)

    def uniform(self, purpose: Purpose, width: int, stream: int = 0) -> Tensor:
        """float64 [B, width], uniform on the open interval (0, 1) in steps of 2^-32.

        Equal arguments give equal numbers. `stream` (0 .. 2^16 - 1) separates several draws of one purpose at one
        iteration, as for groups or blocks.
        """
        blocks = (width + 3) // 4
        rows = to_exact(self.rows)
        counters = torch.empty(len(rows), blocks, 4, dtype=torch.int64, device=rows.device)
        counters[..., 0] = torch.arange(blocks, device=rows.device)
        counters[..., 1] = rows[:, None]
        counters[..., 2] = self.iteration
        counters[..., 3] = purpose + (stream << 16)
        words = philox4x32(counters, (self.seed & _LOW_32, (self.seed >> 32) & _LOW_32))  # [B, blocks, 4]
        return (words.flatten(1)[:, :width].double() + 0.5) * 2.0 ** -32  # [B, W]

    def derived_seed(self, purpose: Purpose, stream: int = 0) -> int:
        """A seed below 2^63 for a library's own generator (dropout); reads the first row only."""
        first = replace(self, rows=self.rows[:1].cpu())
        low, high = (first.uniform(purpose, 2, stream)[0] * 2.0 ** 32).long().tolist()
        return (high & 0x7FFFFFFF) << 32 | low


def keyed(seed: int, iteration: int, first_row: int, count: int, device: torch.device | str = 'cpu') -> RowRandom:
    """`RowRandom` of the `count` consecutive global rows from `first_row` on, for a network on `device`: its numbers
    are made where float64 exists."""
    return RowRandom(seed, iteration, torch.arange(first_row, first_row + count, device=exact_device(device)))
