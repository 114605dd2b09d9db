"""Loads a model in Hugging Face's form, from a folder or by its name on the hub, as a trunk of this program.

Nothing is converted. Only the hub's own cache is written. Pickles are read with `weights_only`. `trust_remote_code` is
off unless the user turns it on.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from core.common.errors import UserError, is_out_of_memory
from core.common.expressions import excerpt
from core.data.corpus import file_hash
from core.pretrained.trunk import (TRIAL_TOKENS, Framing, PretrainedTrunk, detach_output_layer, make_bidirectional,
                                   sees_both_sides)
from core.pretrained.vocabulary import TokenizerVocabulary
from model import GPTConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Predicts = Literal['auto', 'own', 'next']
USUAL_LENGTH = 512  # tokens at once if no length is given, and the limit of a model that states none
INSTALL = "pip install 'transformers' 'tokenizers'"
SHIFTED = ('dream',)  # model types whose hidden states predict the next position
UNSHIFTED = ('llada',)  # causal by their class, bidirectional by their code
LENGTHS = ('max_position_embeddings', 'max_sequence_length', 'n_positions')  # where configs keep their longest input
_OF_MODELS = ('predicts', 'mask_token', 'trust_remote_code')  # options
_FILES = ('*.json', '*.txt', '*.model', '*.py', '*.jinja')  # what is fetched with the weights


@dataclass(frozen=True)
class Source:
    """Which model, and what its files do not tell. model: folder or hub name. predicts: for causal architectures,
    whether a hidden state predicts its own position or the next. mask_token: the text of the mask token if the
    tokenizer names none."""

    model: str
    trust_remote_code: bool = False
    predicts: Predicts = 'auto'
    mask_token: str | None = None

    @classmethod
    def of(cls, options: object) -> 'Source':
        """From a script's options, which have these names."""
        return cls(options.model, options.trust_remote_code, options.predicts, options.mask_token)


@dataclass(frozen=True)
class Pretrained:
    """A loaded model. folder: holds its files. said: lines to print about it. head: SHA-256 (hex) of the weights of its
    heads; empty without heads."""

    source: Source
    folder: Path
    model: PretrainedTrunk
    vocabulary: TokenizerVocabulary
    said: list[str]
    head: str = ''

    @cached_property
    def hash_with_head(self) -> str:
        """SHA-256 (hex) over all that decides its predictions."""
        read = [self.hash, self.head, self.model.next_token, self.model.config.mask_token_id]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over config and weights files. It identifies the base model of a head."""
        return folder_hash(self.folder)


def load_pretrained(source: Source, device: torch.device, dtype: torch.dtype = torch.float32,
                    heads: Mapping[str, Any] = MappingProxyType({}), seed: int = 1337) -> Pretrained:
    """The model of `source` on `device`, its weights in `dtype`. heads: fields of `GPTConfig` that ask for heads.

    UserError if the model is missing, damaged, of another kind, or needs remote code that is not allowed.
    """
    _require_library()
    folder = find_folder(source)
    with _quiet_library():
        config = _read_config(source, folder)
        tokenizer = _read_tokenizer(source, folder)
        network = _read_network(source, folder, config, dtype).to(device)
    said, next_token = [], _predicts_next(source, config)
    causal_class = not _is_masked_class(config)
    if causal_class:
        make_bidirectional(network)
    framing = _framing_of(tokenizer)
    vocabulary = TokenizerVocabulary.of(tokenizer, _vocabulary_size(network), _mask_token(source, tokenizer, network))
    length, width = _longest(source, network, tokenizer, framing), network.get_output_embeddings().in_features
    try:
        model_config = GPTConfig(
            block_size=length, vocab_size=vocabulary.size, n_layer=getattr(config, 'num_hidden_layers', 1),
            n_head=_head_count(config, width), n_embd=width, position_encoding='absolute',
            mask_token_id=vocabulary.mask_token_id, freeze_transformer=True, **heads)
    except ValueError as error:
        raise UserError(str(error)) from error
    trial = _trial(vocabulary, min(TRIAL_TOKENS, length)).to(device)
    tap, lm_head = detach_output_layer(network, trial[:1])
    model = PretrainedTrunk(network.eval(), tap, lm_head, framing, model_config, next_token, seed)
    if trial.size(1) > 1 and not sees_both_sides(model, trial):
        raise UserError(f'{source.model} predicts from the text on the left alone ({type(network).__name__}), so it is '
                        f'a causal model and fills no masks; give a masked language model')
    said.append(f'{source.model}: {type(network).__name__}, {model.parameter_count():,} parameters, '
                f'{vocabulary.base_size} of {vocabulary.size} ids may be drawn, at most {length} tokens at once'
                + (', hidden states predict the next position' if next_token else ''))
    return Pretrained(source, folder, model, vocabulary, said)


def pretrained_problems(options: object, explicit: Mapping[str, str]) -> list[str]:
    """Messages about options of a script that exclude `model`, or that need it."""
    if options.model is None:
        return [f'{name} was given, but applies only with model; add --model=FOLDER_OR_NAME or leave {name} out'
                for name in (*_OF_MODELS, 'text_file', 'window_length', 'sampler_head') if name in explicit]
    if not options.model:
        return ['model is empty; name a folder or a model on the hub: --model=FOLDER_OR_NAME']
    return [f'model and {name} were both given, but exclude each other; leave one out'
            for name in ('checkpoint_name', 'dataset', 'data_dir', 'split') if name in explicit]


# Finding it -----------------------------------------------------------------------------------------------------------

def _require_library() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f'model is given, but reading it needs the package transformers ({error}); install it: '
                        f'{INSTALL}') from error


def find_folder(source: Source) -> Path:
    """The folder of a model's files: the one that is named, or the one in the hub's cache after fetching."""
    folder = Path(os.path.expanduser(source.model))
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f'model is {source.model}, a file; give the folder that holds its config.json')
        if not (folder / 'config.json').is_file():
            raise UserError(f'model is {source.model}, a folder without config.json; give a folder that '
                            f'save_pretrained wrote, or a name on the hub')
    elif source.model.startswith(('.', '/', '~')) or source.model.count('/') != 1:
        raise UserError(f'model is {source.model}, but there is no such folder; give one that holds config.json, or a '
                        f'name on the hub such as answerdotai/ModernBERT-base')
    else:
        folder = _fetched(source.model)
    if not weights_of(folder):
        raise UserError(f'{source.model} holds no weights: neither *.safetensors nor pytorch_model*.bin are in '
                        f'{folder}; copy them there')
    return folder


def _fetched(name: str) -> Path:
    """The folder with the hub's files of a model. Pickled weights are fetched only if there are no others."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_FILES, '*.safetensors'], etag_timeout=10))
        return folder if weights_of(folder) else Path(snapshot_download(name, allow_patterns=[*_FILES, '*.bin']))
    except Exception as error:  # the hub's client raises its own errors, its network library's and the system's
        if is_out_of_memory(error):
            raise
        raise UserError(f'{name} is no folder here and could not be fetched from the hub '
                        f'({type(error).__name__}: {excerpt(str(error).splitlines()[0] if str(error) else "")}); check '
                        f'the name and the network, or download it elsewhere and give its folder') from error


def folder_hash(folder: Path) -> str:
    """SHA-256 (hex) over the config and weights files of a model's folder."""
    files = {path.name: file_hash(path) for path in (folder / 'config.json', *weights_of(folder))}
    return hashlib.sha256(''.join(f'{name} {files[name]}\n' for name in sorted(files)).encode()).hexdigest()


def weights_of(folder: Path) -> list[Path]:
    """The weights files: safetensors if there are any, otherwise pickled ones."""
    return sorted(folder.glob('*.safetensors')) or sorted(folder.glob('pytorch_model*.bin'))


# Reading it -----------------------------------------------------------------------------------------------------------

@contextmanager
def _quiet_library() -> Iterator[None]:
    """Turn off the library's own progress bars and warnings. This program prints what matters."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _unreadable(source: Source, part: str, error: Exception) -> UserError:
    """The error for a part of the model that the library refused."""
    if is_out_of_memory(error):
        raise error
    if 'trust_remote_code' in str(error) and not source.trust_remote_code:
        return UserError(f'{source.model} brings Python code of its own, which would run here with your rights; read '
                         f'it, and if you trust it add --trust_remote_code=True')
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UserError(f'the {part} of {source.model} cannot be read ({type(error).__name__}: '
                     f'{excerpt(lines[0] if lines else "")}); is the folder whole, and transformers new enough?')


def _read_config(source: Source, folder: Path) -> 'PretrainedConfig':
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code, local_files_only=True)
    except Exception as error:  # remote code and the library can raise anything
        raise _unreadable(source, 'config', error) from error
    if config.is_encoder_decoder:
        raise UserError(f'{source.model} is an encoder with a decoder ({config.model_type}), which writes left to '
                        f'right; give a masked language model')
    return config


def _read_tokenizer(source: Source, folder: Path) -> 'PreTrainedTokenizerBase':
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code, local_files_only=True)
    except Exception as error:
        raise _unreadable(source, 'tokenizer', error) from error


def _is_masked_class(config: 'PretrainedConfig') -> bool:
    """Whether the library or the folder has a masked language model for this config."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING or 'AutoModelForMaskedLM' in _remote(config)


def _remote(config: 'PretrainedConfig') -> Mapping[str, str]:
    """The classes whose code is in the folder, by the library's names."""
    return getattr(config, 'auto_map', None) or {}


def _class_of(source: Source, config: 'PretrainedConfig') -> type:
    """The library's class that reads a model of this config. UserError for a causal model, unless its type or the
    option `predicts` tells that it was trained as a diffusion model."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, MODEL_FOR_CAUSAL_LM_MAPPING

    if _is_masked_class(config):
        return AutoModelForMaskedLM
    if source.predicts == 'auto' and config.model_type.lower() not in (*SHIFTED, *UNSHIFTED):
        kind = 'a causal model' if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else 'no masked language model'
        raise UserError(f'{source.model} is {kind} ({config.model_type}), and this program needs one that fills masks; '
                        f'if it was trained as a diffusion model on that architecture, say what its hidden states '
                        f'predict: --predicts=own or --predicts=next')
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or \
        'AutoModelForCausalLM' in _remote(config) else AutoModel


def _predicts_next(source: Source, config: 'PretrainedConfig') -> bool:
    """Whether hidden states predict the next position."""
    return source.predicts == 'next' or source.predicts == 'auto' and config.model_type.lower() in SHIFTED


def _read_network(source: Source, folder: Path, config: 'PretrainedConfig', dtype: torch.dtype) -> 'PreTrainedModel':
    """The library's model with all its weights. UserError if some are missing; the library would make them random."""
    kind = _class_of(source, config)
    config.use_cache = False
    try:
        network, report = kind.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=source.trust_remote_code, local_files_only=True,
            weights_only=True, output_loading_info=True)
    except Exception as error:
        raise _unreadable(source, 'weights', error) from error
    missing = sorted(report['missing_keys']) + sorted(str(key) for key in report['mismatched_keys'])
    if missing:
        raise UserError(f'{source.model} lacks {len(missing)} weights of {type(network).__name__}, such as '
                        f'{excerpt(missing[0])}; was it saved without its language-modelling head?')
    return network


def _vocabulary_size(network: 'PreTrainedModel') -> int:
    """V: rows of the output layer."""
    decoder = network.get_output_embeddings()
    if not isinstance(decoder, torch.nn.Linear):
        raise UserError(f'{type(network).__name__} has no output layer over tokens; give a masked language model')
    return decoder.out_features


def _mask_token(source: Source, tokenizer: 'PreTrainedTokenizerBase', network: 'PreTrainedModel') -> int:
    """The mask token's id: the user's, else the tokenizer's, else the config's."""
    if source.mask_token is not None:
        token = tokenizer.get_vocab().get(source.mask_token)
        if token is None:
            raise UserError(f'mask_token is {source.mask_token!r}, which the tokenizer of {source.model} does not '
                            f'have; give a token of it')
    else:
        token = tokenizer.mask_token_id
        if token is None:
            token = getattr(network.config, 'mask_token_id', None)
    if token is None:
        raise UserError(f'the tokenizer of {source.model} names no mask token; give it, as in --mask_token="<|mask|>"')
    if token >= _vocabulary_size(network):
        raise UserError(f'the mask token of {source.model} has id {token}, but the model has ids 0 to '
                        f'{_vocabulary_size(network) - 1}; give another one with --mask_token=...')
    return token


def _framing_of(tokenizer: 'PreTrainedTokenizerBase') -> Framing:
    """The tokens that the tokenizer puts around a text."""
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for probe in ('A', 'a', '.'):
        bare = tokenizer(probe, add_special_tokens=False, verbose=False)['input_ids']
        framed = tokenizer(probe, verbose=False)['input_ids']
        for start in range(len(framed) - len(bare) + 1):
            if bare and framed[start:start + len(bare)] == bare:
                return Framing(tuple(framed[:start]), tuple(framed[start + len(bare):]), padding)
    return Framing(padding=padding)


def _longest(source: Source, network: 'PreTrainedModel', tokenizer: 'PreTrainedTokenizerBase', framing: Framing) -> int:
    """Most tokens of text that the model reads at once: its limit minus the frame."""
    limits = [getattr(network.config, name) for name in LENGTHS if getattr(network.config, name, None)]
    limits += [module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
               for name, module in network.named_modules()
               if name.endswith('position_embeddings') and isinstance(module, torch.nn.Embedding)]
    limits += [tokenizer.model_max_length] if tokenizer.model_max_length < 10**9 else []
    limit = min(limits, default=USUAL_LENGTH) - len(framing.before) - len(framing.after)
    if limit < 1:
        raise UserError(f'{source.model} reads at most {min(limits)} tokens, which leaves none for text')
    return limit


def _head_count(config: 'PretrainedConfig', width: int) -> int:
    """How many attention heads a sampler head that reads rows has: as many as the model if the width allows, else 1."""
    count = getattr(config, 'num_attention_heads', None) or 1
    return count if width % count == 0 and width // count % 2 == 0 else 1


def _trial(vocabulary: TokenizerVocabulary, length: int) -> Tensor:
    """int64 [2, length]: two texts that differ only in the last token, if the vocabulary has several tokens."""
    ids = vocabulary.allowed.nonzero().squeeze(1)
    first = ids[torch.arange(length) * 7919 % len(ids)]
    other = first.clone()
    other[-1] = ids[(torch.arange(len(ids))[ids == first[-1]] + 1) % len(ids)][0]
    return torch.stack((first, other))
