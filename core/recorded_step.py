"""A training step that is recorded once as a CUDA graph and replayed from then on.

A small model's step is some thousand operations, and a host takes longer to start them than a GPU to compute them. A
graph starts all of them at once. The numbers stay the same: a replay runs the operations that were recorded, in their
order. What changes from step to step lies in tensors on the device: the batch, the learning rates, the weight of the
average (`TrainingState.set_rates`), and the seed of dropout, which torch hands to a graph itself.

Only steps of one micro-step on one rank are recorded, and only if they never wait for the device. A step that draws
text (critic, rewards) waits, so it runs without a recording.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from core.batches import Batch
from core.common.printing import complain
from core.objective import Losses

STEPS_BEFORE = 3  # of one kind that run unrecorded: they compile, choose kernels and make the optimizers' state


class Taken(NamedTuple):
    """What a step returns: its losses, and the norms of its gradients before clipping, by name; scalars on the device.
    """

    losses: Losses
    norms: dict[str, Tensor]

    def copied(self) -> 'Taken':
        """The same, in tensors that the next replay does not overwrite."""
        total, main, heads, sums = self.losses
        return Taken(Losses(total.clone(), main.clone(), {name: loss.clone() for name, loss in heads.items()},
                            None if sums is None else sums.clone()),
                     {name: norm.clone() for name, norm in self.norms.items()})


Body = Callable[[Batch], Taken]  # one whole step on a batch that lies on the device


class Recording(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    taken: Taken


class StepRecorder:
    """Recordings of the steps of one training, one for each kind of step and shape of batch."""

    def __init__(self) -> None:
        self.works = True
        self._seen: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()  # graphs never run at once, so they share their memory

    @property
    def recorded(self) -> int:
        """How many recordings there are."""
        return len(self._recordings)

    def step(self, kind: Hashable, batch: Batch, body: Body, device: torch.device) -> Taken:
        """Run `body` on the host's batch: unrecorded for the first steps of this kind, then recorded, then replayed."""
        key = kind, tuple((tensor.shape, tensor.dtype) for tensor in batch)
        self._seen[key] += 1
        if self._seen[key] <= STEPS_BEFORE or not self.works:
            return body(batch.to(device))
        if key not in self._recordings:
            recording = self._record(batch.to(device), body)
            if recording is None:
                return body(batch.to(device))
            self._recordings[key] = recording
        graph, place, taken = self._recordings[key]
        for tensor, value in zip(place, batch):
            tensor.copy_(value.pin_memory(), non_blocking=True)
        graph.replay()
        return taken.copied()

    def _record(self, place: Batch, body: Body) -> Recording | None:
        """The recording of one step, which does not compute it; None if it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                taken = body(place)
        except RuntimeError as error:
            self.works = False
            complain(f'steps are not recorded as CUDA graphs ({str(error).splitlines()[0]}); they run one operation at '
                     f'a time, which is slower')
            return None
        return Recording(graph, place, taken)

