"""The network as generation sees it: a model whose calls are counted and timed, and its helpers.

Letters: B rows, T window length, D = n_embd, N positions picked out of a batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from core.common.drawing import Chosen
from core.common.errors import UserError
from core.common.timing import TimingAccumulator
from model import GPT, KeyValueCache
from sample_utils import Filler, Head, WaveRecorder, draw_wave, wrong_probabilities

LOGITS, CRITIC_SCORES, REMASKING_SCORES = "the network's logits", "the critic's scores", "the remasking model's scores"


class Network:
    """A model whose calls are counted and timed.

    trunk_calls: evaluations of the generator's trunk for predictions. network_calls: these, and the calls of every
    helper and of the critic. One call serves a whole batch. autocast: a lower precision for the calls, or None. encode,
    wave: the trunk call and `draw_wave`, if compiled. recorder: draws all waves of a fill where it can.
    remasking_model: judges tokens instead of the model's own critic head. verified: see `Filler`. The weights must not
    change while it is in use.
    """

    def __init__(self, model: GPT, timer: TimingAccumulator, autocast: torch.dtype | None = None,
                 encode: Callable[..., Tensor] | None = None, remasking_model: GPT | None = None,
                 wave: Callable[..., Chosen] = draw_wave, recorder: WaveRecorder | None = None,
                 verified: bool = False) -> None:
        self.model, self.timer, self.autocast, self.remasking_model = model, timer, autocast, remasking_model
        self._encode, self._wave, self._recorder, self._verified = encode or model.encode, wave, recorder, verified
        self.compiled = encode is not None  # then every call is to have the same shape
        self.fillers: dict[Head, Filler] = {}
        self.left_context: Tensor | None = None  # int64 [B, L], what the sampler head sees before the first position
        self.trunk_calls = self.network_calls = 0

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The precision that the network computes in, without gradients."""
        device = next(self.model.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            yield

    def encode(self, tokens: Tensor, cache: KeyValueCache | None = None, positions: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D], or [N, D] of positions: one trunk call, see `GPT.encode`. Calls with a cache
        or positions are not compiled, since their lengths change."""
        self.trunk_calls += 1
        self.network_calls += 1
        with self.timer.measure('trunk'):
            if cache is None and positions is None:
                return self._encode(tokens)
            return self.model.encode(tokens, cache=cache, positions=positions)

    def filler(self, head: Head) -> Filler:
        """How its hidden states become tokens through `head`; made once."""
        if head not in self.fillers:
            self.fillers[head] = Filler(self.model, head, self._wave, self._recorder, self._verified)
        return self.fillers[head]

    @property
    def judging(self) -> str:
        """The name of what judges how wrong tokens are."""
        return CRITIC_SCORES if self.remasking_model is None else REMASKING_SCORES

    def critic(self, tokens: Tensor) -> Tensor:
        """Probability [B, T] that each token is wrong, by the remasking model if there is one, else by the critic
        head: one network call, and no trunk call."""
        self.network_calls += 1
        if self.remasking_model is not None:
            with self.timer.measure('remasking model'):
                return wrong_probabilities(self.remasking_model, tokens)
        with self.timer.measure('critic'):
            return self.model.critic_scores(tokens)


class Soundness:
    """Whether all values that were read are finite: a network that gives NaN must not print letters.

    Each step adds a bool on the device for each kind of value. The host reads them once a window, or at each step that
    is watched.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._broken: dict[str, Tensor] = {}

    def look_at(self, whose: str, values: Tensor) -> Tensor:
        """The values [...] themselves, once seen; whose: what they are."""
        self._broken[whose] = self._broken.get(whose, torch.zeros((), dtype=torch.bool, device=self._device)) | \
            values.isnan().any()
        return values

    def require(self) -> None:
        """UserError if anything was not a number."""
        for whose, broken in self._broken.items():
            if bool(broken):
                option = 'remasking_checkpoint_name' if whose == REMASKING_SCORES else 'checkpoint_name'
                raise UserError(f'{whose} are not numbers (NaN or infinite); the checkpoint is damaged or its training '
                                f'diverged: take an earlier one ({option}), or dtype=float32')
