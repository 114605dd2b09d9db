"""Files of heads that were trained on a pretrained trunk. The weights are safetensors. A JSON file next to them holds
the rest, with the name and the hash of the base model."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from core.common.errors import UserError
from core.common.expressions import excerpt
from core.common.files import atomic_files
from core.common.typed_json import Count, Unfit, checked, read_json, verify_checksum, with_checksum
from core.pretrained.loading import Pretrained, Source, load_pretrained
from core.pretrained.trunk import PretrainedTrunk
from model import GPTConfig

FORMAT = 'masked-diffusion-head'
SUFFIX, DESCRIPTION = '.safetensors', '.json'
HEAD_FIELDS = ('add_sampler_head', 'sampler_kind', 'sampler_min_neighbors_ratio', 'sampler_context',
               'sampler_context_left', 'sampler_context_right', 'sampler_order', 'sampler_gate', 'sampler_output',
               'sampler_residual', 'sampler_n_embd', 'sampler_attention_n_embd', 'sampler_zero_hidden',
               'add_critic_head')  # of GPTConfig
MODULES = ('sampler_head.', 'critic_head.')


class Description(TypedDict):
    """What the JSON file holds. heads: `HEAD_FIELDS`. weights: SHA-256 of the safetensors file. next_token,
    mask_token_id: how the base model was read."""

    sha256: str
    format: Literal['masked-diffusion-head']
    version: Literal[1]
    base_model: str
    base_hash: str
    next_token: bool
    mask_token_id: Count
    heads: dict[str, object]
    steps: Count
    weights: str


class HeadFile(NamedTuple):
    """A head read from `path`: its description, and its weights by their names in `PretrainedTrunk`."""

    path: Path
    description: Description
    weights: Mapping[str, Tensor]

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `GPTConfig` that build it."""
        return dict(self.description['heads'])


def head_weights(model: PretrainedTrunk) -> dict[str, Tensor]:
    """The weights of the heads only, by name."""
    return {name: weight for name, weight in model.state_dict().items() if name.startswith(MODULES)}


class Base(NamedTuple):
    """Which model a head belongs to: its name, `folder_hash`, and whether its hidden states predict the next
    position."""

    name: str
    hash: str
    next_token: bool


def base_of(pretrained: Pretrained) -> Base:
    """The model in the form that a head's file records."""
    return Base(pretrained.source.model, pretrained.hash, pretrained.model.next_token)


def save_head(path: Path, base: Base, shape: tuple[GPTConfig, Mapping[str, Any]], weights: Mapping[str, Tensor],
              steps: int) -> None:
    """Write heads with `weights` to `path`, and the description next to it. shape: a config with `HEAD_FIELDS`, and
    values that replace fields of it."""
    config, changes = shape
    data = safetensors.torch.save({name: weight.detach().cpu().contiguous() for name, weight in weights.items()})
    description = {
        'format': FORMAT, 'version': 1, 'base_model': base.name, 'base_hash': base.hash, 'next_token': base.next_token,
        'mask_token_id': config.mask_token_id, 'steps': steps, 'weights': hashlib.sha256(data).hexdigest(),
        'heads': {name: getattr(config, name) for name in HEAD_FIELDS} | dict(changes)}
    with atomic_files([path, path.with_suffix(DESCRIPTION)]) as (file, described):
        file.write(data)
        described.write(with_checksum(description))


def read_head(name: str) -> HeadFile:
    """The head in the safetensors file `name`. UserError if it or its description is missing or damaged."""
    path = Path(name)
    try:
        stored = read_json(path.with_suffix(DESCRIPTION))
        description = checked(stored, Description)
        verify_checksum(stored)
        known = {one.name for one in fields(GPTConfig)} & set(HEAD_FIELDS)
        if set(description['heads']) != known:
            raise Unfit('its heads are described by other options than those of this program')
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != description['weights']:
            raise Unfit(f'{path.name} does not have the SHA-256 that {path.with_suffix(DESCRIPTION).name} gives')
        return HeadFile(path, description, safetensors.torch.load(data))
    except (OSError, Unfit, safetensors.SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or str(error)
        raise UserError(f'sampler_head is {name}, which is no head that this program can read ({excerpt(reason)}); it '
                        f'needs {path.with_suffix(SUFFIX).name} and {path.with_suffix(DESCRIPTION).name} as '
                        f'config/train_head_on_pretrained.py writes them') from None


def put_on(head: HeadFile, base: Pretrained) -> None:
    """Load the head's weights into `base`. Its model was built with the head's fields. UserError if the head belongs to
    another base model."""
    stated, model = head.description, base.model
    if stated['base_hash'] != base.hash:
        raise UserError(f'sampler_head {head.path} was trained on {stated["base_model"]} (hash '
                        f'{stated["base_hash"][:12]}), but the model given is {base.source.model} (hash '
                        f'{base.hash[:12]}); give that model, or train a head on this one')
    if (stated['next_token'], stated['mask_token_id']) != (model.next_token, model.config.mask_token_id):
        raise UserError(f'sampler_head {head.path} was trained with '
                        f'predicts={"next" if stated["next_token"] else "own"} and mask id {stated["mask_token_id"]}, '
                        f'but now it is {"next" if model.next_token else "own"} and {model.config.mask_token_id}; give '
                        f'the same --predicts and --mask_token')
    expected = {name: weight.shape for name, weight in head_weights(model).items()}
    if {name: weight.shape for name, weight in head.weights.items()} != expected:
        raise UserError(f'sampler_head {head.path} holds other weights than its description says; it was made by '
                        f'another program')
    model.load_state_dict(head.weights, strict=False)


def load_with_head(source: Source, head: str | None, device: torch.device, dtype: torch.dtype | None) -> Pretrained:
    """The model of `source`, with the head in the file `head` unless that is None. dtype: of weights; None: float32."""
    found = None if head is None else read_head(head)
    base = load_pretrained(source, device, dtype or torch.float32, {} if found is None else found.fields)
    if found is None:
        return base
    put_on(found, base)
    return replace(base, head=found.description['weights'])
