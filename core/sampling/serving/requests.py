"""What the page may ask for, and the options of sample.py that this makes.

A request is a JSON object with some of `FIELDS`. Texts are taken as they are: no @FILE is read, and a
backslash is a backslash.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

from core.common.errors import UserError, raise_problems
from core.common.expressions import unknown_choice
from core.sampling.options import QualityMetric, SampleConfig
from core.sampling.outputs import OUTPUTS
from core.sampling.policies import POLICIES
from core.sampling.policy_options import POLICY_OPTIONS, judged_policies
from core.sampling.presets import PRESETS

LONGEST_TEXT = 2048  # tokens
MOST_STEPS = 1000
FIELDS: dict[str, type] = {
    'start_text': str, 'infill_text': str, 'infill_char': str, 'preset': str, 'sampling_policy': str, 'iterations': int,
    'temperature': float, 'sequence_length': int, 'block_length': int, 'seed': int, 'tokens': list, 'take_back': list,
    'doubt': bool}
NOT_OPTIONS = ('tokens', 'take_back', 'doubt')
KINDS = {str: 'a text', int: 'a whole number', float: 'a number', list: 'a list of whole numbers',
         bool: 'true or false'}
LIMITS = {'sequence_length': LONGEST_TEXT, 'iterations': MOST_STEPS}
UNUSED = (*OUTPUTS, 'start_text', 'infill_text', 'infill_char', 'seed_placement', 'max_new_tokens', 'num_samples',
          'batch_size', 'quality_metric', 'judge_checkpoint_name', 'confidence_groups', 'show_progress',
          'use_verbose_logging', 'log_debug', 'animate', 'verify_drafts')


class Asked(NamedTuple):
    """What a run is to be. config and explicit: as sample.py reads them; tokens: of a text whose positions `take_back`
    are redrawn, empty for a new text; doubt: the critic's opinion is told with each step."""

    config: SampleConfig
    explicit: dict[str, str]
    tokens: list[int]
    take_back: list[int]
    doubt: bool


def serving_problems(explicit: Mapping[str, str]) -> list[str]:
    """Options that were given although the page has no use for them."""
    return [f'{name} does not apply to serve=True; leave it out' for name in UNUSED if name in explicit]


def read_request(body: bytes, config: SampleConfig, explicit: Mapping[str, str]) -> Asked:
    """The run that `body` asks for, with the options of the server for the rest; UserError lists all problems."""
    fields = _fields(body)
    raise_problems([problem for name, value in fields.items() if (problem := _problem(name, value)) is not None])
    tokens, take_back = fields.get('tokens', []), fields.get('take_back', [])
    options = {name: value for name, value in fields.items() if name not in NOT_OPTIONS}
    raise_problems(_redraw_problems(tokens, take_back, options))
    if 'infill_text' in options and 'sequence_length' not in options:
        config = replace(config, sequence_length=None)  # a text with gaps has its own length
    config = replace(config, num_samples=1, batch_size=1, quality_metric=QualityMetric.NONE, **options)
    explicit = {**_applicable(explicit, config), **dict.fromkeys(options, 'page')}
    return Asked(config, explicit, tokens, take_back, fields.get('doubt', False))


def _applicable(explicit: Mapping[str, str], config: SampleConfig) -> dict[str, str]:
    """The options of the command that suit the policy: the others are defaults of the page that wait for another."""
    row = POLICIES.get(config.sampling_policy)
    if row is None:  # which is a problem of its own
        return dict(explicit)
    unsuited = {*POLICY_OPTIONS} - {*row.options} | (
        set() if config.sampling_policy in judged_policies() else {'remasking_checkpoint_name'})
    return {name: source for name, source in explicit.items() if name not in unsuited}


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise UserError('the request is not JSON; reload the page') from None
    if not isinstance(fields, dict):
        raise UserError('the request is not a JSON object; reload the page')
    return fields


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with one field."""
    kind = FIELDS.get(name)
    if kind is None:
        return f'{name[:40]!r} is no option of the page; it has {", ".join(FIELDS)}'
    right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if right and kind is list:
        right = all(type(item) is int for item in value)
    if right and kind is float:
        right = abs(value) <= 10**6 and math.isfinite(value)
    if not right:
        return f'{name} must be {KINDS[kind]}; correct it'
    if name == 'preset' and value not in PRESETS:
        return unknown_choice('preset', value, PRESETS)[0]
    if name in LIMITS and value > LIMITS[name]:
        return f'{name} is {value}, but the page takes at most {LIMITS[name]:,}; lower it'
    return None


def _redraw_problems(tokens: list[int], take_back: list[int], options: Mapping[str, Any]) -> list[str]:
    if not tokens and not take_back:
        return []
    if not tokens or not take_back:
        return ['tokens and take_back go together; mark at least one token of a finished text']
    problems = [f'{name} does not apply to a redraw; leave it out'
                for name in ('start_text', 'infill_text', 'infill_char', 'sequence_length') if name in options]
    if len(tokens) > LONGEST_TEXT:
        problems.append(f'the text has {len(tokens):,} tokens, but the page takes at most {LONGEST_TEXT:,}; shorten it')
    if not all(0 <= position < len(tokens) for position in take_back):
        problems.append(f'take_back names a position outside the text of {len(tokens)} tokens; reload the page')
    return problems
