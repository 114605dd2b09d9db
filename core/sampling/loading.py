"""From options and files to what generation takes: prompts, checkpoint, helpers, the network."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

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
from core.data.vocabulary import Vocabulary
from core.sampling.calibration import find_calibration
from core.sampling.generation import GenerationSettings, reads_blocks
from core.sampling.network import Network
from core.sampling.options import SampleConfig
from core.sampling.policies import POLICIES
from core.sampling.policy_options import (DIFFUSION, block_defaults, build_policy, choose_guide, guidance_problems,
                                          make_policy, model_problems, reads_thresholds, remasking_levels, remasks)
from core.sampling.prompt import Layout, lay_out_infill, lay_out_prompt, split_infill, start_token
from model import GPT
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


def lay_out(config: SampleConfig, vocabulary: Vocabulary, block_size: int, generator: RowRandom) -> Layout:
    """The start of the rows of `generator`: prompt or infill text, masks elsewhere."""
    mask = vocabulary.mask_token_id
    if config.infill_text:
        pieces = [piece if isinstance(piece, int) else vocabulary.encode(piece)
                  for piece in split_infill(config.infill_text, config.infill_char)]
        size = sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)
        return lay_out_infill(pieces, config.sequence_length or size, mask, generator)
    prompt = vocabulary.encode(config.start_text) if config.start_text else []
    length = len(prompt) + config.max_new_tokens if config.max_new_tokens else config.sequence_length or block_size
    return lay_out_prompt(prompt, length, mask, generator, config.seed_placement)


# The checkpoint -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to sample from, its helpers, and what is to be said about it."""

    model: GPT
    remasking_model: GPT | None
    judge: GPT | None
    vocabulary: Vocabulary
    settings: GenerationSettings
    device: torch.device
    said: list[str]


def load(config: SampleConfig, explicit: Mapping[str, str]) -> Loaded:
    """The checkpoint of `config` and all that it needs; UserError where something does not suit the options."""
    device = torch.device(resolve_device(config.device))
    use_precision(device, config.dtype)
    path, found = find_checkpoint(config.out_dir, config.checkpoint_name, 'checkpoint_name' in explicit)
    checkpoint = load_checkpoint(path, device='cpu')
    model_config = model_config_from_dict(checkpoint.model_config, path)
    raise_problems(model_problems(config, explicit, model_config, CheckpointKind(checkpoint.kind)))
    sampler, critic, said = started_heads(model_config, checkpoint.iteration)
    if config.sampling_method == 'sampler' and not sampler:
        raise UserError(f'sampling_method is sampler, but {said[0]}; train longer or take --sampling_method=diffusion')
    why = said[-1] if model_config.add_critic_head and not critic else 'the checkpoint has none'
    asks = POLICIES[config.sampling_policy].needs_critic
    through_head = config.sampling_method in DIFFUSION and sampler and config.use_sampler_head
    config, chosen = block_defaults(config, explicit, model_config,
                                    through_head and model_config.sampler_order == 'left_to_right')
    said += chosen
    raise_problems(guidance_problems(config, critic, why))
    said = [*found, *said]
    if remasks(config) and remasking_levels(config):
        guide, line = choose_guide(config, critic, why)
        config, asks = replace(config, guidance=guide), guide in ('model', 'critic')
        said.append(line)
    vocabulary = Vocabulary.from_meta(checkpoint.vocabulary)
    model = build_model(checkpoint, device).requires_grad_(False)
    remasking_model, judge = _load_helpers(config, vocabulary, device)
    rule = DrawRule(allowed_ids(model_config.vocab_size, vocabulary.base_size, device), config.temperature,
                    config.top_k or None, config.top_p, config.repetition_penalty)
    diffusing, calibrate = config.sampling_method in DIFFUSION, None
    if diffusing and config.guidance == 'critic' and reads_thresholds(config):
        calibration, line = find_calibration(path)
        said.append(line)
        calibrate = None if calibration is None else calibration.to(exact_device(device)).error_rate
    policy = build_policy(config, calibrate, checkpoint.noise_schedule()) if diffusing else None
    if config.sampling_method == 'standard' and reads_blocks(model_config, config.block_length):
        policy = make_policy('left_to_right', iterations=config.block_length)  # one position a call
    settings = GenerationSettings(config.sampling_method, rule, policy, config.iterations,
                                  model_config.sampler_order if through_head else 'none',
                                  diffusing and asks, start_token(vocabulary),
                                  config.block_length, config.verify_drafts)
    if config.compile:
        said.append(_compile_line(device))
    return Loaded(model, remasking_model, judge, vocabulary, settings, device, said)


def _load_helpers(config: SampleConfig, vocabulary: Vocabulary, device: torch.device) -> tuple[GPT | None, GPT | None]:
    """The remasking model and the judge, as far as they are named."""
    remasking_model = judge = None
    if config.remasking_checkpoint_name:
        remasking_model = load_remasking_model(config.remasking_checkpoint_name, config.out_dir, vocabulary, device)
    if config.judge_checkpoint_name:
        judge = load_judge(config.judge_checkpoint_name, config.out_dir, vocabulary, device)
    return remasking_model, judge


def _compile_line(device: torch.device) -> str:
    """What is said before the first call, which compiles. UserError where that cannot be."""
    problem = compile_problem(device.type)
    if problem is not None:
        raise UserError(f'compile is True, but {problem}; or leave compile out')
    return f'compiling, about {COMPILING_SECONDS} s'


def require_blocks(config: SampleConfig, loaded: Loaded, length: int) -> None:
    """The helpers must be able to read what they are to judge: a window of text, or all of it behind the CLS token."""
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
    """The model with its calls counted and timed, in the asked precision, compiled where that is asked for."""
    encode, wave = (torch.compile(loaded.model.encode), torch.compile(draw_wave, dynamic=True)) if config.compile else \
        (None, draw_wave)
    return Network(loaded.model, timer, choose_autocast(config.dtype, loaded.device), encode, loaded.remasking_model,
                   wave)
