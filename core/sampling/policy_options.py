"""What sample.py's options mean: checks in plain sentences, the remasking levels, the policy.

`explicit` names the options that were given.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from configurator import bound_problems
from core.checkpoints.kinds import CheckpointKind
from core.common.expressions import unknown_choice
from core.noise import LINEAR, NoiseSchedule
from core.pretrained.loading import pretrained_problems
from core.sampling.options import QualityMetric, SampleConfig
from core.sampling.policies import GUIDES, POLICIES, REMASKING, Policy
from core.sampling.policies.guides import by_critic_or_confidence
from model import GPTConfig
from sample_utils import REMASKING_SCHEDULES

DIFFUSION = ('diffusion', 'sampler')  # the methods that follow a policy
POLICY_OPTIONS = tuple(dict.fromkeys(name for row in POLICIES.values() for name in row.options))
METHODS_OF = {  # options that not every method has
    **{name: DIFFUSION for name in ('preset', 'sampling_policy', 'block_length', *POLICY_OPTIONS, 'use_sampler_head',
                                       'remasking_checkpoint_name')},
    'iterations': (*DIFFUSION, 'multinomial'),
    'top_p': (*DIFFUSION, 'standard'),
    'top_k': (*DIFFUSION, 'standard'),
}


# Checks -------------------------------------------------------------------------------------------------------------

def judged_policies() -> tuple[str, ...]:
    """The policies that use a guide or a critic."""
    return ('remask', *(name for name, row in POLICIES.items() if row.needs_critic))


def option_problems(config: SampleConfig, explicit: Mapping[str, str]) -> list[str]:
    """Problems of the options, before any file is read: a sentence each, with value, limit and cure."""
    unknown = [problem for name, choices in (
        ('sampling_policy', POLICIES), ('schedule_type', (*REMASKING_SCHEDULES, 'custom')),
        ('guidance', ('auto', *GUIDES)))
        for problem in unknown_choice(name, getattr(config, name), choices)]
    if unknown:
        return unknown
    return [*_range_problems(config), *_policy_range_problems(config), *_applicability_problems(config, explicit),
            *_policy_problems(config, explicit), *_custom_problems(config, explicit),
            *_guidance_contradictions(config, explicit), *pretrained_problems(config, explicit)]


def _range_problems(config: SampleConfig) -> list[str]:
    problems = bound_problems(config)
    if config.top_k is not None and config.top_k < 0:
        problems.append(f'top_k is {config.top_k}, but must not be negative; 0 is off')
    problems += [f'{name} is {getattr(config, name)}, but must lie in [0, 1]' for name in
                 ('start_ratio', 'end_ratio', 'start_threshold', 'end_threshold', 'randomness_strength')
                 if getattr(config, name) is not None and not 0 <= getattr(config, name) <= 1]
    problems += [f'masking_ratios holds {ratio}, but every ratio must lie in [0, 1]'
                 for ratio in config.masking_ratios or () if not 0 <= ratio <= 1]
    if config.temperature < 0:
        problems.append(f'temperature is {config.temperature}, but must not be negative; 0 is greedy')
    if not 0 < config.top_p <= 1:
        problems.append(f'top_p is {config.top_p}, but must lie in (0, 1]; 1 is off')
    if config.repetition_penalty <= 0:
        problems.append(f'repetition_penalty is {config.repetition_penalty}, but must be above 0; 1 is off')
    if len(config.infill_char) != 1:
        problems.append(f'infill_char is {config.infill_char!r}, but must be one character')
    return problems


def _policy_range_problems(config: SampleConfig) -> list[str]:
    problems = [f'{name} is {getattr(config, name)}, but must not be negative'
                for name in ('choice_temperature', 'planner_eta', 'entropy_bound', 'selection_noise')
                if getattr(config, name) is not None and getattr(config, name) < 0]
    problems += [f'{name} is {getattr(config, name)}, but must lie in [0, 1]' for name in
                 ('remdm_eta', 'confidence_threshold')
                 if getattr(config, name) is not None and not 0 <= getattr(config, name) <= 1]
    problems += [f'{name} is {getattr(config, name)}, but must lie between 0 and 1' for name in
                 ('loop_on', 'loop_off', 'loop_alpha') if not 0 < getattr(config, name) < 1]
    if config.loop_off > config.loop_on:
        problems.append(f'loop_off is {config.loop_off}, but must not exceed loop_on ({config.loop_on}): time runs '
                        f'from 1 to 0')
    if config.parallel_factor <= 0:
        problems.append(f'parallel_factor is {config.parallel_factor}, but must be above 0')
    return problems


def _policy_problems(config: SampleConfig, explicit: Mapping[str, str]) -> list[str]:
    """Options that were given although the chosen policy does not use them."""
    if config.sampling_method not in DIFFUSION:
        return []
    problems = []
    for name in POLICY_OPTIONS:
        if name in explicit and name not in POLICIES[config.sampling_policy].options:
            takers = [policy for policy, row in POLICIES.items() if name in row.options]
            shown = ', '.join(takers[:4]) + (' ...' if len(takers) > 4 else '')
            problems.append(f'{name} does not apply to sampling_policy={config.sampling_policy}; leave it out, or take '
                            f'a policy that has it: {shown}')
    if 'remasking_checkpoint_name' in explicit and config.sampling_policy not in judged_policies():
        problems.append(f'remasking_checkpoint_name does not apply to sampling_policy={config.sampling_policy}; leave '
                        f'it out, or take a policy that asks what is wrong: {", ".join(judged_policies())}')
    return problems


def _applicability_problems(config: SampleConfig, explicit: Mapping[str, str]) -> list[str]:
    """Options that were given although they do not apply; defaults are never a problem."""
    method, problems = config.sampling_method, []
    for name, methods in METHODS_OF.items():
        if name in explicit and method not in methods:
            problems.append(f'{name} does not apply to sampling_method={method}; leave it out, or take '
                            f'sampling_method={" or ".join(methods)}')
    if method == 'sampler' and not config.use_sampler_head:
        problems.append('use_sampler_head is False, but sampling_method=sampler draws through the sampler head; take '
                        'sampling_method=diffusion')
    needs = (('seed_placement', bool(config.start_text), 'start_text'),
             ('infill_char', bool(config.infill_text), 'infill_text'),
             ('start_threshold', config.schedule_mode == 'threshold', 'schedule_mode=threshold'),
             ('end_threshold', config.schedule_mode == 'threshold', 'schedule_mode=threshold'),
             ('start_ratio', config.schedule_mode == 'ratio', 'schedule_mode=ratio'),
             ('end_ratio', config.schedule_mode == 'ratio', 'schedule_mode=ratio'),
             ('randomness_strength', config.schedule_mode == 'ratio', 'schedule_mode=ratio'),
             ('masking_ratios', config.schedule_type == 'custom', 'schedule_type=custom'),
             ('port', config.serve, 'serve=True'),
             ('confidence_groups', config.quality_metric == QualityMetric.SELF, 'quality_metric=self'),
             ('judge_checkpoint_name', config.quality_metric == QualityMetric.JUDGE, 'quality_metric=judge'))
    problems += [f'{name} was given, but applies only with {condition}; add that or leave {name} out'
                 for name, holds, condition in needs if name in explicit and not holds
                 and method in METHODS_OF.get(name, (method,))
                 and (name not in REMASKING or config.sampling_policy == 'remask')]
    if config.quality_metric == QualityMetric.JUDGE and not config.judge_checkpoint_name:
        problems.append('quality_metric is judge, but no judge is named; add --judge_checkpoint_name=...')
    exclusive = (('start_text', 'infill_text'), ('max_new_tokens', 'sequence_length'),
                 ('max_new_tokens', 'infill_text'))
    problems += [f'{first} and {second} were both given, but exclude each other; leave one out'
                 for first, second in exclusive if first in explicit and second in explicit]
    return problems


def _custom_problems(config: SampleConfig, explicit: Mapping[str, str]) -> list[str]:
    """A custom schedule of N ratios is N remaskings, hence N + 1 predictions."""
    if config.schedule_type != 'custom' or not remasks(config):
        return []
    if not config.masking_ratios:
        return ['schedule_type is custom, but masking_ratios is empty; give one ratio per remasking, as in '
                '--masking_ratios="[0.9,0.5,0.1]"']
    problems = [f'{name} does not apply to schedule_type=custom, whose ratios are masking_ratios; leave it out'
                for name in ('start_ratio', 'end_ratio') if name in explicit]
    if config.schedule_mode == 'threshold':
        problems.append('schedule_type=custom lists ratios, but schedule_mode is threshold; take schedule_mode=ratio')
    predictions = len(config.masking_ratios) + 1
    if 'iterations' in explicit and config.iterations != predictions:
        problems.append(f'iterations is {config.iterations}, but the {predictions - 1} masking_ratios make '
                        f'{predictions} predictions; leave iterations out')
    return problems


def model_problems(config: SampleConfig, explicit: Mapping[str, str], model_config: GPTConfig,
                   kind: CheckpointKind) -> list[str]:
    """Options that do not suit the checkpoint."""
    causal, method = model_config.attention_type == 'causal', config.sampling_method
    if not kind.writes_text:
        return [f'{config.checkpoint_name} is a checkpoint of kind {str(kind)!r}, which writes no text; give '
                f'--checkpoint_name=... of a language model, and this one as {kind.use}=...']
    problems = []
    if causal and method != 'standard':
        problems.append(f'the checkpoint is causal, but sampling_method={method} needs a bidirectional one; take '
                        f'--sampling_method=standard')
    if causal and config.infill_text:
        problems.append('infill_text needs a bidirectional checkpoint: a causal one sees no text after a gap')
    if causal and config.seed_placement == 'random':
        problems.append('seed_placement=random needs a bidirectional checkpoint; take seed_placement=prefix')
    if causal and 'confidence_groups' in explicit:
        problems.append('confidence_groups does not apply to a causal checkpoint; leave it out')
    if model_config.attention_type == 'block':
        problems += [*_block_problems(config, model_config), *verifying_problems(config, explicit, model_config)]
    elif config.verify_drafts and not model_config.reads_row:
        problems.append('verify_drafts needs a block model or a sampler head that reads rows; train one with '
                        'config/train_char_block.py --block_length=[1,8], or with --sampler_kind=layer')
    elif config.verify_drafts:
        problems += [f'{name} does not apply to verify_drafts; leave one of them out' for name, given in (
            ('use_sampler_head=False', not config.use_sampler_head),
            ('repetition_penalty', config.repetition_penalty != 1),
            (f'sampling_method={method}', method not in DIFFUSION)) if given]
    if not model_config.add_sampler_head and (method == 'sampler' or 'use_sampler_head' in explicit and
                                              config.use_sampler_head and method == 'diffusion'):
        cure = 'a checkpoint trained with add_sampler_head=True' if config.model is None else \
            'train one with config/train_head_on_pretrained.py and give --sampler_head=FILE'
        problems.append(f'{"the checkpoint" if config.model is None else config.model} has no sampler head; take '
                        f'--sampling_method=diffusion without use_sampler_head, or {cure}')
    return problems


def _block_problems(config: SampleConfig, model_config: GPTConfig) -> list[str]:
    """Options that do not suit a block model. A block model that was also trained on whole windows works as a plain
    diffusion model at that length."""
    lengths, window = model_config.block_length, model_config.block_size
    if config.block_length is not None and config.block_length not in lengths:
        return [f'block_length is {config.block_length}, but the checkpoint was trained with {_listed(lengths)}; take '
                f'one of these']
    if block_length_of(config, model_config) == window:
        return []
    cure = f'take --block_length={window}, which it was trained with too' if window in lengths else \
        f'take a checkpoint that was trained with block_length={window} too'
    problems = [f'{name} needs text on both sides, but a block model sees nothing after the block in work; {cure}'
                for name, given in (('infill_text', bool(config.infill_text)),
                                    ('seed_placement=random', config.seed_placement == 'random')) if given]
    if config.preset is not None:
        problems.append(f'preset is {config.preset}, but presets suit a model that reads whole windows; leave it out, '
                        f'or {cure}')
    if config.remasking_checkpoint_name:
        problems.append(f'remasking_checkpoint_name reads whole texts, but a block model writes blocks; leave it out, '
                        f'or {cure}')
    if config.sampling_method == 'multinomial':
        problems.append(f'sampling_method is multinomial, which redraws a whole window; take '
                        f'--sampling_method=diffusion or {cure}')
    return problems


def verifying_problems(config: SampleConfig, explicit: Mapping[str, str], model_config: GPTConfig) -> list[str]:
    """What keeps drafts from being verified."""
    if not config.verify_drafts:
        return []
    unused = ('iterations', *(name for name in POLICY_OPTIONS if name != 'iterations'))
    problems = [f'{name} does not apply to verify_drafts, which follows no policy; leave one of them out'
                for name in unused if name in explicit]
    if config.infill_text or config.seed_placement == 'random':
        problems.append('verify_drafts writes from left to right after a prompt; leave out infill_text and '
                        'seed_placement=random, or verify_drafts')
    if config.block_length in (1, model_config.block_size):
        problems.append(f'block_length is {config.block_length}, but verify_drafts drafts blocks of more than one token '
                        f'and less than the window ({model_config.block_size}); take one of these or leave it out')
    if 1 not in model_config.block_length or max(model_config.block_length) == 1:
        problems.append(f'verify_drafts needs a checkpoint that was trained with block_length=1 and a longer one, but '
                        f'this one has {_listed(model_config.block_length)}; train one with --block_length=[1,8]')
    if not model_config.add_sampler_head or model_config.sampler_order != 'left_to_right' or not config.use_sampler_head:
        problems.append('verify_drafts drafts through a sampler head that writes from left to right; take a checkpoint '
                        'trained with --add_sampler_head=True --sampler_order=left_to_right')
    if config.sampling_method not in DIFFUSION or config.sampling_policy != 'remask':
        problems.append('verify_drafts follows no policy; leave sampling_method and sampling_policy out')
    if config.repetition_penalty != 1:
        problems.append('repetition_penalty does not apply to verify_drafts; leave one of them out')
    return problems


def _listed(lengths: Sequence[int]) -> str:
    return f'block_length={lengths[0]}' if len(lengths) == 1 else f'block lengths {", ".join(map(str, lengths))}'


def block_length_of(config: SampleConfig, model_config: GPTConfig) -> int | None:
    """How many positions are finished before the next ones: the given number; else a block model's shortest length
    above 1, or its whole window if the text on both sides must be read."""
    if config.block_length is not None or model_config.attention_type != 'block':
        return config.block_length
    lengths, both_sides = model_config.block_length, bool(config.infill_text) or config.seed_placement == 'random'
    if both_sides and model_config.block_size in lengths:
        return model_config.block_size
    return min((length for length in lengths if length > 1), default=1)


def block_defaults(config: SampleConfig, explicit: Mapping[str, str], model_config: GPTConfig,
                   ordered_head: bool) -> tuple[SampleConfig, list[str]]:
    """A block model's defaults of options that were not given, and lines about them. A sampler head that writes from
    left to right takes one trunk call a block; otherwise there is one for every two positions."""
    length = block_length_of(config, model_config)
    if model_config.attention_type != 'block' or length == model_config.block_size:
        return replace(config, block_length=length), []
    said = [f'blocks of {length}']
    if config.sampling_method in DIFFUSION and 'iterations' not in explicit and \
            'iterations' in POLICIES[config.sampling_policy].options:
        config = replace(config, iterations=1 if ordered_head else max(1, length // 2))
        said = [f'{said[0]}, iterations={config.iterations} for each']
    return replace(config, block_length=length), said


# Who guides -------------------------------------------------------------------------------------------------------------


def remasks(config: SampleConfig) -> bool:
    """Whether the policy remask is followed."""
    return config.sampling_method in DIFFUSION and config.sampling_policy == 'remask'


def _guidance_contradictions(config: SampleConfig, explicit: Mapping[str, str]) -> list[str]:
    """Options of the policy remask that exclude each other, each a sentence."""
    if not remasks(config):
        return []
    guide, helper, problems = config.guidance, config.remasking_checkpoint_name, []
    random = guide == 'random' or guide == 'auto' and not config.intelligent_remasking
    asked = 'guidance=random' if guide == 'random' else 'intelligent_remasking=False'
    if guide == 'model' and not helper:
        problems.append(f'guidance is model, but no remasking model is named; add --remasking_checkpoint_name=..., '
                        f'trained with: {CheckpointKind.REMASKING.command}')
    if guide not in ('auto', 'model', 'random') and helper:
        problems.append(f'remasking_checkpoint_name was given, but guidance={guide} does not ask it; take guidance=model, '
                        f'or leave remasking_checkpoint_name out')
    if random and helper:
        problems.append(f'remasking_checkpoint_name was given, but {asked} remasks at random; leave one of them out')
    if guide not in ('auto', 'random') and not config.intelligent_remasking:
        problems.append(f'guidance is {guide}, but intelligent_remasking is False, which remasks at random; leave one of '
                        f'them out')
    if guide == 'random' and config.intelligent_remasking and 'intelligent_remasking' in explicit:
        problems.append('guidance is random, but intelligent_remasking is True; leave one of them out')
    if random and config.schedule_mode == 'threshold':
        problems.append(f'schedule_mode is threshold, but with {asked} nothing tells how wrong a token is; take another '
                        f'guidance, or schedule_mode=ratio')
    elif random and 'randomness_strength' in explicit:
        problems.append(f'randomness_strength does not apply to {asked}, which draws every position; leave it out')
    elif (guide != 'auto' or helper) and not random and config.schedule_mode == 'ratio' and \
            config.randomness_strength == 1:
        told = f'guidance={guide}' if guide != 'auto' else 'the remasking model'
        problems.append(f'randomness_strength is 1, which leaves {told} nothing to choose; lower it, or take '
                        f'guidance=random')
    return problems


def guidance_problems(config: SampleConfig, critic: bool, why: str) -> list[str]:
    """Policies and guidance that need a critic where there is none; critic: there is a trained one, and if not, `why`
    says so."""
    if config.sampling_method not in DIFFUSION or critic:
        return []
    if POLICIES[config.sampling_policy].needs_critic and not config.remasking_checkpoint_name:
        return [f'sampling_policy={config.sampling_policy} needs a critic, but {why}; take another policy, a '
                f'checkpoint trained with add_critic_head=True, or a remasking model (remasking_checkpoint_name)']
    if config.guidance not in ('auto', 'model') and GUIDES[config.guidance].asks_critic and remasks(config):
        return [f'guidance is {config.guidance}, but {why}; take guidance=self, or a checkpoint trained with add_critic_head=True']
    return []


def choose_guide(config: SampleConfig) -> tuple[str, str]:
    """The guide of the policy remask, and a line that names it. The critic guides only if it is asked for, because it
    guides worse than the drawn tokens' own probabilities, which cost nothing (docs/remasking.md)."""
    if config.guidance != 'auto':
        guide, reason = config.guidance, 'as asked for'
    elif not config.intelligent_remasking:
        guide, reason = 'random', 'intelligent_remasking is False'
    elif config.schedule_mode == 'ratio' and config.randomness_strength == 1:
        guide, reason = 'random', 'randomness_strength is 1'
    elif config.remasking_checkpoint_name:
        guide, reason = 'model', f'remasking_checkpoint_name is {config.remasking_checkpoint_name}'
    else:
        guide, reason = 'self', 'no remasking model is named'
    return guide, f'guidance {guide}: {reason}'


# From options to what generation takes -------------------------------------------------------------------------------

def remasking_levels(config: SampleConfig) -> list[float]:
    """One level for each remasking. There is a remasking between any two of the `iterations` predictions."""
    if config.schedule_type == 'custom':
        return list(config.masking_ratios)
    first, last = (config.start_ratio, config.end_ratio) if config.schedule_mode == 'ratio' else _thresholds(config)
    return REMASKING_SCHEDULES[config.schedule_type](config.iterations - 1, first, last)


def _thresholds(config: SampleConfig) -> tuple[float, float]:
    """The first and the last threshold: those that were given, else those of the guide."""
    guide = choose_guide(config)[0] if config.guidance == 'auto' else config.guidance
    start, end = GUIDES[guide].thresholds  # `option_problems` refuses chance
    return (start if config.start_threshold is None else config.start_threshold,
            end if config.end_threshold is None else config.end_threshold)


def reads_thresholds(config: SampleConfig) -> bool:
    """Whether the policy compares wrongness with thresholds. Only the policy remask has a schedule_mode."""
    return config.sampling_policy == 'remask' and config.schedule_mode == 'threshold'


def build_policy(config: SampleConfig, calibrate: Callable[[Tensor], Tensor] | None = None,
                 schedule: NoiseSchedule = LINEAR) -> Policy:
    """The chosen policy with its options; calibrate: what thresholds put the critic's wrongness through; schedule: of
    the checkpoint."""
    row = POLICIES[config.sampling_policy]
    if config.sampling_policy == 'remask':
        usual = by_critic_or_confidence if config.intelligent_remasking else None
        wrongness = usual if config.guidance == 'auto' else GUIDES[config.guidance].wrongness
        return row.make(remasking_levels(config), config.schedule_mode, config.randomness_strength, wrongness, calibrate)
    timed = {'schedule': schedule} if row.timed else {}
    options = {name: getattr(config, name) for name in row.options}
    usual = four_at_once(USUAL_NELBO)
    return row.make(**{name: usual[name] if value is None and name in usual else value
                       for name, value in options.items()}, **timed)


USUAL_NELBO = 1.9  # nats a token, of the main recipe


def four_at_once(nelbo: float) -> dict[str, float]:
    """Options of adaptive policies by which a call reveals about four tokens, for a model of this NELBO in nats a token.

    Measured on the main recipe at temperature 0.8 (docs/LOG.md). The bound counts all entropies of a group but the
    largest, three in a group of four. While much is masked, they lie above the NELBO, which is their mean over all mask
    shares. A drawn token has a probability of about exp(-NELBO).
    """
    return {'entropy_bound': 4.3 * nelbo, 'confidence_threshold': min(1.0, 1.055 * math.exp(-nelbo))}


def adaptive_defaults(config: SampleConfig, nelbo: float | None) -> tuple[SampleConfig, list[str]]:
    """Values for the options of an adaptive policy that were not given, from the checkpoint's NELBO (None: not known),
    and a line that names them."""
    if config.sampling_method not in DIFFUSION or nelbo is None:
        return config, []
    found = {name: float(f'{value:.3g}') for name, value in four_at_once(nelbo).items()
             if name in POLICIES[config.sampling_policy].options and getattr(config, name) is None}
    said = [f'{name}={value:g}, for about four tokens a call: the NELBO is {nelbo:.3f}' for name, value in found.items()]
    return replace(config, **found), said


def make_policy(name: str, schedule: NoiseSchedule = LINEAR, **options: Any) -> Policy:
    """A policy with `options`, and for the rest the defaults of sample.py; schedule: of the checkpoint."""
    return build_policy(SampleConfig(sampling_policy=name, **options), schedule=schedule)


def policy_help() -> str:
    """One line per policy for --help: name, trunk calls per block of n masked positions, what it does."""
    lines = [f'  {name:<20} {row.calls:<19} {row.summary}' for name, row in POLICIES.items()]
    return '\n'.join(['sampling policies, and their trunk calls per block of n masked positions:', *lines])
