"""The model, loaded once, and its runs: each step is told as it happens, the last finished runs are kept for a while.

Letters: L sequence length, T window length.
"""

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.common.errors import UserError, raise_problems
from core.common.precision import exact_device
from core.common.randomness import RowRandom
from core.common.runtime import resolve_device
from core.common.timing import TimingAccumulator
from core.sampling.generation import generate, reads_blocks, windows
from core.sampling.loading import Loaded, lay_out, make_network, open_model, require_blocks, suit
from core.sampling.network import Network
from core.sampling.options import SampleConfig
from core.sampling.picture import moving_picture
from core.sampling.policies import POLICIES
from core.sampling.policy_options import METHODS_OF, block_defaults, option_problems
from core.sampling.presets import PRESETS, with_preset
from core.sampling.prompt import Layout
from core.sampling.replay import Decode, page_text, replay_data
from core.sampling.result import Batch, SamplingResult
from core.sampling.serving.queue import Queue
from core.sampling.serving.requests import LONGEST_TEXT, MOST_STEPS, Asked, read_request
from core.sampling.trace import Trace, TraceStep

KEPT = 16  # finished runs whose files can be had

Tell = Callable[[dict[str, Any]], None]


class Job(NamedTuple):
    """A run that can begin: layout [1, L]; rows: its random numbers; said: lines about its settings."""

    asked: Asked
    loaded: Loaded
    layout: Layout
    rows: RowRandom
    said: list[str]


class Service:
    """Writes texts with one model. queue: whose turn it is; said: the lines about finding the model."""

    def __init__(self, config: SampleConfig, explicit: Mapping[str, str]) -> None:
        self._device = torch.device(resolve_device(config.device))
        opened = open_model(config, explicit, self._device)
        if opened.config.attention_type == 'causal' and 'sampling_method' not in explicit:
            config = replace(config, sampling_method='standard')
        model = opened.build()
        self._opened = opened._replace(build=lambda: model)
        self._config, self._explicit = config, explicit
        config, preset = with_preset(config, explicit)
        loaded = suit(config, explicit, self._opened, self._device)
        self.said = [*preset, *loaded.said]
        self._usual = block_defaults(config, explicit, opened.config, loaded.settings.head == 'left_to_right')[0]
        self._in_blocks = reads_blocks(opened.config, self._usual.block_length)
        self._judges = opened.config.attention_type == 'bidirectional' and (
            opened.critic or config.remasking_checkpoint_name is not None)
        self.queue = Queue()
        self._finished: OrderedDict[str, SamplingResult] = OrderedDict()

    def offers(self) -> dict[str, Any]:
        """What the page shows before the first run."""
        config, opened = self._usual, self._opened
        follows = config.sampling_method in METHODS_OF['sampling_policy']
        policies = {name: {'summary': row.summary, 'steps': 'iterations' in row.options}
                    for name, row in POLICIES.items()
                    if not row.needs_critic or opened.critic or config.remasking_checkpoint_name} if follows else {}
        name = config.model or config.checkpoint_name
        presets = {preset: {'summary': row.summary, 'options': row.options} for preset, row in PRESETS.items()}
        return {'model': name, 'presets': presets if follows and not self._in_blocks else {}, 'policies': policies,
                'steps': config.sampling_method in METHODS_OF['iterations'], 'notes': self._notes(),
                'critic': self._judges, 'gaps': opened.config.attention_type != 'causal' and not self._in_blocks,
                'values': {option: getattr(config, option) for option in (
                    'preset', 'sampling_policy', 'iterations', 'temperature', 'seed', 'infill_char')},
                'length': min(LONGEST_TEXT, config.sequence_length or opened.usual_length),
                'longest': LONGEST_TEXT, 'most_steps': MOST_STEPS}

    def _notes(self) -> list[str]:
        """Sentences on what this model cannot do on the page, and why."""
        if self._opened.config.attention_type == 'causal':
            return ['This model writes from left to right and sees nothing after a gap: it fills no gaps and redraws '
                    'nothing.']
        if self._in_blocks:
            return [f'This model writes in blocks of {self._usual.block_length} tokens and sees nothing after a block: '
                    f'it fills no gaps, and a redraw fits the text before it and its own block.',
                    'Steps count for each block. Presets were measured on models that read whole windows, so there '
                    'are none here.', 'Doubt is not shown, since a critic shades whole windows only.']
        return [] if self._judges else ['Doubt is not shown, since this model has no trained critic; start the page '
                                        'with --remasking_checkpoint_name=... to ask a remasking model.']

    def prepare(self, body: bytes) -> Job:
        """The run that a request asks for; UserError where it cannot be. No network is called."""
        asked = read_request(body, self._config, self._explicit)
        config, preset = with_preset(asked.config, asked.explicit)
        asked = asked._replace(config=config)
        raise_problems(option_problems(config, asked.explicit))
        loaded = suit(asked.config, asked.explicit, self._opened, self._device)
        rows = RowRandom(asked.config.seed, 0, torch.arange(1, device=exact_device(self._device)))
        layout = self._laid_out(asked, rows)
        length = layout.tokens.size(1)
        if length > LONGEST_TEXT:
            raise UserError(f'the text has {length:,} tokens, but the page takes at most {LONGEST_TEXT:,}; shorten it')
        require_blocks(asked.config, loaded, length)
        if asked.doubt and not self._judges:
            raise UserError('doubt needs a critic or a remasking model that reads whole windows, but there is none')
        return Job(asked, loaded, layout, rows, [*preset, *loaded.said[len(self._opened.said):]])

    def _laid_out(self, asked: Asked, rows: RowRandom) -> Layout:
        if not asked.tokens:
            return lay_out(asked.config, self._opened.vocabulary, self._opened.usual_length, rows)
        if self._opened.config.attention_type == 'causal':
            raise UserError('a causal model cannot redraw a token inside a text; write a new one')
        allowed = self._opened.allowed
        if not all(0 <= token < len(allowed) for token in asked.tokens) or not bool(allowed[asked.tokens].all()):
            raise UserError('tokens holds a number that is no token of a text; reload the page')
        tokens = torch.tensor([asked.tokens], device=rows.rows.device)
        taken = torch.zeros_like(tokens, dtype=torch.bool)
        taken[0, asked.take_back] = True
        return Layout(tokens.masked_fill(taken, self._opened.vocabulary.mask_token_id), ~taken)

    def run(self, job: Job, tell: Tell) -> None:
        """Do a job and tell it: 'start', a 'frame' for each step, 'done'. Ends early where `tell` raises."""
        timer, decode = TimingAccumulator(self._device), self._opened.vocabulary.decode
        network = make_network(job.asked.config, job.loaded, timer)
        judge = make_network(job.asked.config, job.loaded, timer) if job.asked.doubt else None
        trace = Trace(asdict(job.asked.config), job.layout.protected.cpu())
        tell({'event': 'start', **self._start(job)})

        def watch(step: TraceStep) -> None:
            trace.add(step)
            data = replay_data(Trace({}, trace.protected, [step]), decode)
            for frame in data['samples'][0]['frames']:
                doubt = None if judge is None or step.event != 'predict' else self._doubt(judge, step)
                tell({'event': 'frame', 'frame': frame, 'pieces': data['pieces'], 'doubt': doubt})

        began = time.perf_counter()
        made = generate(network, job.layout, job.loaded.settings, job.rows, watch)
        seconds, tokens = time.perf_counter() - began, made.tokens.cpu()
        text, name = decode(tokens[0].tolist()), secrets.token_urlsafe(12)
        result = SamplingResult(True, trace, waves=made.waves, trunk_calls=network.trunk_calls,
                                network_calls=network.network_calls, seconds=seconds)
        result.add(Batch([text], tokens, trace.protected, None))
        self._finished[name] = result
        while len(self._finished) > KEPT:
            self._finished.popitem(last=False)
        tell({'event': 'done', 'text': text, 'tokens': tokens[0].tolist(), 'run': name,
              'trunk_calls': network.trunk_calls, 'network_calls': network.network_calls, 'seconds': seconds})

    def _start(self, job: Job) -> dict[str, Any]:
        """The text before the first step, and where blocks begin."""
        tokens, fixed = (part[0].cpu() for part in job.layout)
        positions = fixed.nonzero().squeeze(1).tolist()
        prompt = tokens[fixed].tolist()
        decode = self._opened.vocabulary.decode
        return {'length': len(tokens), 'protected': positions, 'prompt': prompt,
                'pieces': {str(token): decode([token]) for token in set(prompt)},
                'blocks': block_starts(len(tokens), job.loaded), 'said': job.said}

    def _doubt(self, judge: Network, step: TraceStep) -> list[float]:
        """How wrong the critic finds each position of the window, 0..1."""
        tokens: Tensor = step.tokens[:1].to(self._device)
        with judge.precision():
            wrong = judge.critic(tokens)[0]
        masked = step.tokens[0] == self._opened.vocabulary.mask_token_id
        return wrong.double().cpu().nan_to_num(0.0).masked_fill(masked, 0.0).mul(1000).round().div(1000).tolist()

    def file(self, run: str, name: str) -> tuple[bytes, str] | None:
        """A finished run as a file of that name and its type; None where there is none."""
        finished, make = self._finished.get(run), FILES.get(name)
        if finished is None or make is None:
            return None
        return make[0](finished, self._opened.vocabulary.decode), make[1]


def block_starts(length: int, loaded: Loaded) -> list[int]:
    """The positions where a new window or block begins, without the first."""
    config, width = loaded.model.config, loaded.settings.block_length
    if reads_blocks(config, width):
        return list(range(width, length, width))
    starts = set()
    for window in windows(length, config.block_size):
        starts.add(window.first_new)
        starts.update(start for start in range(window.start, window.stop, width or config.block_size)
                      if start > window.first_new)
    return sorted(starts - {0})


def _json(finished: SamplingResult, decode: Decode) -> bytes:
    return (json.dumps(finished.to_builtins(decode)) + '\n').encode()


def _html(finished: SamplingResult, decode: Decode) -> bytes:
    return page_text(finished.trace, decode).encode()


def _gif(finished: SamplingResult, decode: Decode) -> bytes:
    return moving_picture(finished.trace, decode)[0]


FILES: dict[str, tuple[Callable[[SamplingResult, Decode], bytes], str]] = {
    'run.json': (_json, 'application/json'), 'run.html': (_html, 'text/html; charset=utf-8'),
    'run.gif': (_gif, 'image/gif')}
