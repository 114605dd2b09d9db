"""Models that help another model: a remasking model or a judge helps a generator, a generator helps a training.

Each comes from a checkpoint, which records its kind. A model that does not fit is refused in one sentence.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from core.checkpoints.checkpoint import Checkpoint, load_checkpoint
from core.checkpoints.heads import started_heads
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.weights import build_model
from core.common.drawing import DrawRule, allowed_ids
from core.common.errors import UserError
from core.common.randomness import RowRandom
from core.data.vocabulary import Vocabulary
from core.noise import apply_mask
from model import GPT
from sample_utils import predict_and_sample_tokens

REMASKING_KINDS = (CheckpointKind.REMASKING, CheckpointKind.CLASSIFIER, CheckpointKind.MULTICLASS)


def load_remasking_model(name: str, out_dir: Path | str, vocabulary: Vocabulary, device: torch.device) -> GPT:
    """The remasking model of any kind in the checkpoint `name`, a file in out_dir or any other path."""
    return _load(name, 'remasking_checkpoint_name', out_dir, REMASKING_KINDS, 'tells no wrong tokens', vocabulary,
                 device)[0]


def load_judge(name: str, out_dir: Path | str, vocabulary: Vocabulary, device: torch.device) -> GPT:
    """The judge in the checkpoint `name`, a file in out_dir or any other path."""
    return _load(name, 'judge_checkpoint_name', out_dir, (CheckpointKind.JUDGE,), 'judges no text', vocabulary,
                 device)[0]


def load_generator(name: str, vocabulary: Vocabulary, device: torch.device,
                   option: str = 'corruption_checkpoint') -> tuple[GPT, bool]:
    """The unmasking model that `option` names, and whether its sampler head had begun to train."""
    model, iteration = _load(name, option, '.', (CheckpointKind.UNMASKING,), 'fills no masks', vocabulary, device)
    return model, started_heads(model.config, iteration)[0]


def helper_path(name: str, out_dir: Path | str) -> Path:
    """The path of the checkpoint `name`: in out_dir if it exists there, otherwise `name` itself."""
    path = Path(out_dir) / name
    return path if path.exists() else Path(name)


def _load(name: str, option: str, out_dir: Path | str, kinds: Sequence[CheckpointKind], complaint: str,
          vocabulary: Vocabulary, device: torch.device) -> tuple[GPT, int]:
    """The model without gradients, and its iteration."""
    checkpoint = _read(name, option, out_dir, kinds, complaint)
    if checkpoint.vocabulary_hash != vocabulary.hash:
        size = Vocabulary.from_meta(checkpoint.vocabulary).base_size
        other = f'{size} tokens' if size != vocabulary.base_size else f'{size} other tokens'
        raise UserError(f'{option} is {name}, whose vocabulary has {other}, but the text has {vocabulary.base_size}; '
                        f'give a checkpoint that was trained on the same corpus')
    return build_model(checkpoint, device).requires_grad_(False), checkpoint.iteration


def _read(name: str, option: str, out_dir: Path | str, kinds: Sequence[CheckpointKind], complaint: str) -> Checkpoint:
    """The checkpoint. UserError if it is missing or not of one of `kinds`."""
    path = helper_path(name, out_dir)
    cure = kinds[0].command
    if not path.exists():
        places = f'neither in {out_dir} nor as a path' if str(out_dir) != '.' else 'no such file'
        raise UserError(f'{option} is {name}, but there is {places}; train one with: {cure}')
    checkpoint = load_checkpoint(path)
    if checkpoint.kind not in kinds:
        raise UserError(f'{option} is {name}, a checkpoint of kind {checkpoint.kind!r}, which {complaint}; give one of '
                        f'kind {" or ".join(kinds)}, trained with: {cure}')
    return checkpoint


def read_generator(name: str, option: str) -> Checkpoint:
    """The checkpoint of an unmasking model that `option` names."""
    return _read(name, option, '.', (CheckpointKind.UNMASKING,), 'fills no masks')


def require_block(model: GPT, option: str, length: int, what: str) -> None:
    """UserError unless `model` can read `length` tokens at once. what: what these tokens are, for the message."""
    if model.config.block_size < length:
        raise UserError(f'{option} has a block_size of {model.config.block_size}, but must read {length} tokens at '
                        f'once ({what}); shorten the text, or give a model trained with --block_size={length} or more')


def one_shot_fill(model: GPT, use_sampler_head: bool, base_size: int,
                  autocast: Callable[[], AbstractContextManager]) -> Callable[[Tensor, Tensor, RowRandom], Tensor]:
    """A `Corruption.fill`: the generator `model` fills the masked positions of a text in one trunk call, at temperature
    1, as inference does. It takes and returns tensors on the CPU. The network computes on its own device."""
    weight = model.transformer['wte'].weight
    rule = DrawRule(allowed_ids(weight.size(0), base_size, weight.device))

    def fill(tokens: Tensor, mask: Tensor, generator: RowRandom) -> Tensor:
        masked = apply_mask(tokens, mask, model.config.mask_token_id).to(weight.device)  # [B, T]
        rows = replace(generator, rows=generator.rows.to(weight.device))
        with autocast():
            return predict_and_sample_tokens(model, masked, rule, rows, use_sampler_head=use_sampler_head).tokens.cpu()

    return fill
