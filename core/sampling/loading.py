"""From options and files to what generation takes: prompts, checkpoint, helpers, the network."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from core.checkpoints.checkpoint import load_checkpoint
from core.checkpoints.heads import started_heads
from core.checkpoints.helpers import load_judge, load_remasking_model, require_block
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.run_folder import find_checkpoint
from core.checkpoints.weights import build_model, model_config_from_dict
from core.common.drawing import DrawRule, allowed_ids
from core.common.errors import UserError, raise_problems
from core.common.precision import exact_device
from core.common.randomness import RowRandom
from core.common.runtime import COMPILING_SECONDS, DTYPES, compile_problem, resolve_device, use_precision
from core.common.timing import TimingAccumulator
from core.data.text_figures import TextFigures
from core.data.vocabulary import Vocabulary
from core.noise import LINEAR, NoiseSchedule
from core.pretrained.head_file import load_with_head
from core.pretrained.loading import USUAL_LENGTH, Source
from core.pretrained.trunk import PretrainedTrunk
from core.pretrained.vocabulary import AnyVocabulary
from core.sampling.calibration import find_calibration
from core.sampling.generation import GenerationSettings, reads_blocks
from core.sampling.held_weights import with_held_weights
from core.sampling.network import Network
from core.sampling.options import SampleConfig
from core.sampling.policies import GUIDES, POLICIES
from core.sampling.policy_options import (DIFFUSION, adaptive_defaults, block_defaults, build_policy, choose_guide,
                                          guidance_problems, make_policy, model_problems, reads_thresholds,
                                          remasking_levels, remasks)
from core.sampling.prompt import Layout, lay_out_infill, lay_out_prompt, split_infill, start_token
from core.sampling.recorded_waves import RecordedWaves
from model import GPT, GPTConfig
from sample_utils import draw_wave

LONGEST_PROMPT = 10_000_000  # characters of a file


# Prompts ------------------------------------------------------------------------------------------------------------

def read_prompts(config: SampleConfig) -> SampleConfig:
    """`config` with start_text and infill_text as they are meant (`prompt_text`)."""
    return replace(config, start_text=prompt_text('start_text', config.start_text),
                   infill_text=prompt_text('infill_text', config.infill_text))


def prompt_text(option: str, given: str) -> str:
    r"""The text that is meant: '@file' is what the file holds (UTF-8) without its last line break, '@@' an @ at the
    start; elsewhere \n is a line break and \\n a backslash before an n. UserError where the file cannot be read."""
    if given.startswith('@') and not given.startswith('@@'):
        return _file_text(option, Path(given[1:]))
    text = given.removeprefix('@') if given.startswith('@@') else given
    return re.sub(r'(\\?)\\n', lambda found: '\\n' if found[1] else '\n', text)


def _file_text(option: str, path: Path) -> str:
    try:
        with open(path, encoding='utf-8-sig') as file:  # line ends of every system are read as \n
            text = file.read(LONGEST_PROMPT + 1)
        if len(text) > LONGEST_PROMPT:
            raise ValueError(f'it has more than {LONGEST_PROMPT:,} characters')
        return text.removesuffix('\n')
    except (OSError, ValueError) as error:  # ValueError: too long, or bytes that are no UTF-8
        reason = getattr(error, 'strerror', None) or error
        reason = 'it is not UTF-8' if isinstance(error, UnicodeDecodeError) else reason
        raise UserError(f'{option} is @{path}, but the file cannot be read ({reason}); write @@ for a text that begins '
                        f'with an @') from None


def lay_out(config: SampleConfig, vocabulary: AnyVocabulary, usual_length: int, generator: RowRandom) -> Layout:
    """The start of the rows of `generator`: prompt or infill text, masks elsewhere; usual_length: tokens of a text
    where no number is asked for."""
    mask = vocabulary.mask_token_id
    if config.infill_text:
        pieces = [piece if isinstance(piece, int) else vocabulary.encode(piece)
                  for piece in split_infill(config.infill_text, config.infill_char)]
        size = sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)
        return lay_out_infill(pieces, config.sequence_length or size, mask, generator)
    prompt = vocabulary.encode(config.start_text) if config.start_text else []
    length = len(prompt) + config.max_new_tokens if config.max_new_tokens else config.sequence_length or usual_length
    return lay_out_prompt(prompt, length, mask, generator, config.seed_placement)


# The checkpoint -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Loaded:
    """A model ready to sample from, and its helpers.

    said: lines to print about it; usual_length: tokens of a text where nobody asks for another number; text_figures:
    how varied the corpus is, None where the checkpoint does not say.
    """

    model: GPT | PretrainedTrunk
    remasking_model: GPT | None
    judge: GPT | None
    vocabulary: AnyVocabulary
    settings: GenerationSettings
    device: torch.device
    said: list[str]
    usual_length: int
    text_figures: TextFigures | None = None


class Opened(NamedTuple):
    """A checkpoint or a pretrained model that was found. sampler, critic: whether it has a trained head; said: the
    lines about finding it; untrained: lines about heads whose training had not begun; schedule: its noise's; build:
    the model on its device; path: of a checkpoint's file, None of others; usual_length, text_figures: see `Loaded`;
    nelbo: nats a token on the validation text, None where it is not known."""

    config: GPTConfig
    kind: CheckpointKind
    sampler: bool
    critic: bool
    said: list[str]
    untrained: list[str]
    vocabulary: AnyVocabulary
    allowed: Tensor
    schedule: NoiseSchedule
    build: Callable[[], GPT | PretrainedTrunk]
    path: Path | None
    usual_length: int
    text_figures: TextFigures | None = None
    nelbo: float | None = None


def load(config: SampleConfig, explicit: Mapping[str, str]) -> Loaded:
    """The model of `config` and all that it needs; UserError where something does not suit the options."""
    device = torch.device(resolve_device(config.device))
    return suit(config, explicit, open_model(config, explicit, device), device)


def open_model(config: SampleConfig, explicit: Mapping[str, str], device: torch.device) -> Opened:
    """The checkpoint or the pretrained model of `config`, for `device`."""
    use_precision(device, config.dtype)
    return open_checkpoint(config, explicit, device) if config.model is None else open_pretrained(config, device)


def suit(config: SampleConfig, explicit: Mapping[str, str], opened: Opened,
         device: torch.device) -> Loaded:
    """What writes as `config` says with a model that was found; UserError where something does not suit the options."""
    raise_problems(model_problems(config, explicit, opened.config, opened.kind))
    if config.sampling_method == 'sampler' and not opened.sampler:
        raise UserError(f'sampling_method is sampler, but {opened.untrained[0]}; train longer or take '
                        f'--sampling_method=diffusion')
    why = opened.untrained[-1] if opened.config.add_critic_head and not opened.critic else 'the checkpoint has none'
    asks = POLICIES[config.sampling_policy].needs_critic
    through_head = config.sampling_method in DIFFUSION and opened.sampler and config.use_sampler_head
    config, chosen = block_defaults(config, explicit, opened.config,
                                    through_head and opened.config.sampler_order == 'left_to_right')
    raise_problems(guidance_problems(config, opened.critic, why))
    config, adapted = adaptive_defaults(config, opened.nelbo)
    said = [*opened.said, *opened.untrained, *chosen, *adapted]
    if remasks(config) and remasking_levels(config):
        guide, line = choose_guide(config)
        config, asks = replace(config, guidance=guide), GUIDES[guide].asks_critic
        said.append(line)
    model, vocabulary = opened.build(), opened.vocabulary
    remasking_model, judge = _load_helpers(config, vocabulary, device)
    rule = DrawRule(opened.allowed, config.temperature, config.top_k or None, config.top_p, config.repetition_penalty)
    diffusing, calibrate = config.sampling_method in DIFFUSION, None
    if diffusing and config.guidance == 'critic' and reads_thresholds(config) and opened.path is not None:
        calibration, line = find_calibration(opened.path)
        said.append(line)
        calibrate = None if calibration is None else calibration.to(exact_device(device)).error_rate
    policy = build_policy(config, calibrate, opened.schedule) if diffusing else None
    if config.sampling_method == 'standard' and reads_blocks(opened.config, config.block_length):
        policy = make_policy('left_to_right', iterations=config.block_length)  # one position a call
    settings = GenerationSettings(config.sampling_method, rule, policy, config.iterations,
                                  opened.config.sampler_order if through_head else 'none',
                                  diffusing and asks, start_token(vocabulary),
                                  config.block_length, config.verify_drafts and opened.config.attention_type == 'block')
    if config.compile:
        said.append(_compile_line(device))
    if config.cuda_graphs and device.type != 'cuda':
        raise UserError(f'cuda_graphs is True, but the device is {device}; leave it out')
    return Loaded(model, remasking_model, judge, vocabulary, settings, device, said, opened.usual_length,
                  opened.text_figures)


def open_checkpoint(config: SampleConfig, explicit: Mapping[str, str], device: torch.device) -> Opened:
    """The checkpoint that the options name."""
    path, found = find_checkpoint(config.out_dir, config.checkpoint_name, 'checkpoint_name' in explicit)
    checkpoint = load_checkpoint(path, device='cpu')
    model_config = model_config_from_dict(checkpoint.model_config, path)
    sampler, critic, untrained = started_heads(model_config, checkpoint.iteration)
    vocabulary = Vocabulary.from_meta(checkpoint.vocabulary)
    kind = CheckpointKind(checkpoint.kind)
    bound = kind is CheckpointKind.UNMASKING or (
        kind is CheckpointKind.BLOCK and checkpoint.config.get('whole_block_share') != 1)
    return Opened(model_config, kind, sampler, critic, found, untrained, vocabulary,
                  allowed_ids(model_config.vocab_size, vocabulary.base_size, device), checkpoint.noise_schedule(),
                  lambda: build_model(checkpoint, device).requires_grad_(False), path, model_config.block_size,
                  TextFigures.from_builtins(checkpoint.extra.get('text_figures')),
                  checkpoint.best_value if bound else None)


def open_pretrained(config: SampleConfig, device: torch.device) -> Opened:
    """The pretrained model that the options name, with its head."""
    raise_problems([f'{option} does not apply to model, which has another vocabulary than checkpoints of this program; '
                    f'leave it out' for option in ('remasking_checkpoint_name', 'judge_checkpoint_name')
                    if getattr(config, option) is not None]
                   + (['compile does not apply to model; leave it out'] if config.compile else []))
    base = load_with_head(Source.of(config), config.sampler_head, device, choose_autocast(config.dtype, device))
    model, vocabulary = base.model, base.vocabulary
    return Opened(model.config, CheckpointKind.UNMASKING, model.sampler_head is not None, model.critic_head is not None,
                  base.said, [], vocabulary, vocabulary.allowed.to(device), LINEAR, lambda: model, None,
                  min(USUAL_LENGTH, model.config.block_size))


def _load_helpers(config: SampleConfig, vocabulary: Vocabulary, device: torch.device) -> tuple[GPT | None, GPT | None]:
    """The remasking model and the judge, as far as they are named."""
    remasking_model = judge = None
    if config.remasking_checkpoint_name:
        remasking_model = load_remasking_model(config.remasking_checkpoint_name, config.out_dir, vocabulary, device)
    if config.judge_checkpoint_name:
        judge = load_judge(config.judge_checkpoint_name, config.out_dir, vocabulary, device)
    return remasking_model, judge


def _compile_line(device: torch.device) -> str:
    """The line before the first call, which compiles. UserError where that cannot be."""
    problem = compile_problem(device.type)
    if problem is not None:
        raise UserError(f'compile is True, but {problem}; or leave compile out')
    return f'compiling, about {COMPILING_SECONDS} s'


def require_blocks(config: SampleConfig, loaded: Loaded, length: int) -> None:
    """The helpers must be able to read what they judge: a window of text, or the whole text after the CLS token."""
    window = min(length, loaded.model.config.block_size)
    if loaded.remasking_model is not None:
        require_block(loaded.remasking_model, f'remasking_checkpoint_name={config.remasking_checkpoint_name}', window,
                      'a window of the generator')
    if loaded.judge is not None:
        require_block(loaded.judge, f'judge_checkpoint_name={config.judge_checkpoint_name}', length + 1,
                      f'the CLS token and {length} of text')


# The network ----------------------------------------------------------------------------------------------------------

def choose_autocast(dtype: str, device: torch.device) -> torch.dtype | None:
    """The precision of autocast, None for float32 throughout."""
    if dtype == 'auto':
        return torch.bfloat16 if device.type == 'cuda' and torch.cuda.is_bf16_supported() else None
    return None if dtype == 'float32' else DTYPES[dtype]


def make_network(config: SampleConfig, loaded: Loaded, timer: TimingAccumulator) -> Network:
    """The model with its calls counted and timed, in the asked precision, compiled where that is asked for.

    On a processor a compiled wave is no faster than an eager one (docs/LOG.md, 24), so there only the trunk is compiled.
    """
    autocast, model = choose_autocast(config.dtype, loaded.device), loaded.model
    if not config.compile and isinstance(model, GPT):  # a compiled call casts by itself
        model = with_held_weights(model, autocast)
    encode = torch.compile(model.encode) if config.compile else None
    wave = torch.compile(draw_wave, dynamic=True) if config.compile and loaded.device.type != 'cpu' else draw_wave
    return Network(model, timer, autocast, encode, loaded.remasking_model,
                   wave, RecordedWaves() if config.cuda_graphs else None,
                   verified=config.verify_drafts and not loaded.settings.verify_drafts)
