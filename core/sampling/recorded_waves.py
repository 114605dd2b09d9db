"""Waves of the sampler head that are recorded once as a CUDA graph and replayed, one replay a wave.

A wave is some thirty small operations on few positions, and a fill has up to a hundred waves. The host takes longer to
start them than the GPU to compute them. A graph starts a whole wave at once. Its shape is fixed, so every wave has the
same number of lanes. Lanes without a position work on a spare place, which is never read.

Letters: N positions of a fill, S lanes, C neighbours, V vocabulary, W width of the head.
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from core.common.drawing import Chosen, DrawRule
from core.common.printing import complain
from model import GPT
from sample_utils import SamplerTables, Wave, Waves, draw_wave

FEWEST_LANES, MOST_RECORDINGS, DEVICE = 8, 16, 'cuda'


class Place(NamedTuple):
    """Where a recorded wave reads and writes: the fields of `Waves` for every position, and a spare row for lanes
    without one. first, number int64 [1]: the first position of the wave, and its number; sizes int64 [waves]."""

    padded: Tensor
    positions: Tensor
    neighbours: Tensor
    logits: Tensor
    projected: Tensor
    new: Tensor | None
    choices: Tensor
    tables: SamplerTables
    sizes: Tensor
    first: Tensor
    number: Tensor


class Recording(NamedTuple):
    """A graph, what it reads, and what it writes: a row for every position and lane. rule: kept, as the graph reads its
    tensor."""

    graph: torch.cuda.CUDAGraph
    place: Place
    chosen: Chosen
    rule: DrawRule


class RecordedWaves:
    """Recordings of waves, one for each number of lanes and way to draw. The model's weights may change in place."""

    def __init__(self) -> None:
        self.works = True
        self._recordings: dict[Hashable, Recording] = {}

    @property
    def recorded(self) -> int:
        """How many recordings there are."""
        return len(self._recordings)

    def run(self, choose: Callable[..., Chosen], model: GPT, tables: SamplerTables, rule: DrawRule, waves: Waves) -> \
            Chosen | None:
        """The tokens of all positions of `waves`, drawn wave by wave; None if they cannot be drawn here."""
        if not self.works or waves.positions.device.type != DEVICE or torch.is_grad_enabled():
            return None
        lanes = max(FEWEST_LANES, 1 << (max(waves.sizes) - 1).bit_length())
        key = (choose, lanes, id(model), id(rule.allowed), rule.temperature, rule.top_k, rule.top_p,
               tables.neighbours.shape, waves.logits.dtype, waves.projected.dtype, waves.room,
               torch.is_autocast_enabled(DEVICE))
        if key not in self._recordings:
            if len(self._recordings) >= MOST_RECORDINGS:
                return None
            recording = self._record(choose, tables, rule, waves, lanes)
            if recording is None:
                return None
            self._recordings[key] = recording
        graph, place, chosen, _ = self._recordings[key]
        fill_place(place, tables, waves)
        for _ in waves.sizes:
            graph.replay()
        return Chosen(*(None if part is None else part[:len(waves.positions)].clone() for part in chosen))

    @torch.no_grad()
    def _record(self, choose: Callable[..., Chosen], tables: SamplerTables, rule: DrawRule, waves: Waves,
                lanes: int) -> Recording | None:
        """The recording of one wave. If it cannot be recorded, None, and a line says why."""
        place, graph = make_place(tables, waves, lanes), torch.cuda.CUDAGraph()
        fill_place(place, tables, waves)
        kept = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)  # lanes write to different places
        precision = torch.autocast('cuda', torch.get_autocast_dtype('cuda'), torch.is_autocast_enabled('cuda'),
                                   cache_enabled=False)  # otherwise the graph would read a freed copy of the weights
        try:
            with precision:
                chosen = make_room(take_wave(choose, rule, place, lanes, None), waves, lanes)
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    take_wave(choose, rule, place, lanes, chosen)
        except RuntimeError as error:
            self.works = False
            complain(f'waves are not recorded as CUDA graphs ({str(error).splitlines()[0]}); they run one operation at '
                     f'a time, which is slower')
            return None
        finally:
            torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])
        return Recording(graph, place, chosen, rule)


def make_place(tables: SamplerTables, waves: Waves, lanes: int) -> Place:
    """Room for `waves.room` positions, what each lane without a position reads and writes, and as many waves."""
    room = waves.room

    def like(tensor: Tensor | None, length: int = room + 1) -> Tensor | None:
        return None if tensor is None else tensor.new_zeros(length, *tensor.shape[1:])

    return Place(like(waves.padded, len(waves.padded) + lanes), like(waves.positions), like(waves.neighbours),
                 like(waves.logits), like(waves.projected), like(waves.new), like(waves.choices),
                 tables._replace(neighbours=torch.empty_like(tables.neighbours)), waves.positions.new_zeros(room),
                 waves.positions.new_zeros(1), waves.positions.new_zeros(1))


def fill_place(place: Place, tables: SamplerTables, waves: Waves) -> None:
    """Copy a fill to where the recorded wave reads it, before its first wave."""
    for name in ('padded', 'positions', 'neighbours', 'logits', 'projected', 'new', 'choices'):
        value = getattr(waves, name)
        if value is not None:
            getattr(place, name)[:len(value)].copy_(value)
    place.tables.neighbours.copy_(tables.neighbours)
    sizes = torch.tensor(waves.sizes).pin_memory() if place.sizes.is_cuda else torch.tensor(waves.sizes)
    place.sizes[:len(sizes)].copy_(sizes, non_blocking=True)
    place.first.zero_()
    place.number.zero_()


def make_room(chosen: Chosen, waves: Waves, lanes: int) -> Chosen:
    """Zeros for what waves write: a row for each of `waves.room` positions, and one for each lane."""
    return Chosen(*(None if part is None else part.new_zeros(waves.room + lanes, *part.shape[1:]) for part in chosen))


def take_wave(choose: Callable[..., Chosen], rule: DrawRule, place: Place, lanes: int,
              into: Chosen | None) -> Chosen:
    """One wave on fixed shapes: draw the tokens of its lanes, write them and the other results of `choose` into `into`,
    and move to the next wave. If `into` is None, nothing is written and nothing moves."""
    room = len(place.positions) - 1
    lane = torch.arange(lanes, device=place.first.device)  # [S]
    size = place.sizes.index_select(0, place.number)  # [1]
    taken, number = lane < size, place.first + lane  # [S]
    index = torch.where(taken, number, room)  # [S]
    neighbours = place.neighbours[index]  # [S, C]
    C, V = neighbours.size(1), place.logits.size(1)
    bags = (place.padded.take(neighbours) + torch.arange(C, device=lane.device) * V).flatten()  # [C S]
    found = draw_wave(choose, place.tables, rule, Wave(
        bags, lane * C, place.projected[index], place.logits[index],
        None if place.new is None else place.new[index], place.choices[index], None))
    if into is None:
        return found
    spare = len(place.padded) - lanes + lane
    place.padded.scatter_(0, torch.where(taken, place.positions[index], spare), found.tokens)
    rows = torch.where(taken, number, room + lane)
    for whole, part in zip(into, found):
        if whole is not None:
            whole.index_copy_(0, rows, part)
    place.first.add_(size)
    place.number.add_(1)
    return into
