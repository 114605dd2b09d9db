"""Exports a checkpoint to a folder that the transformers library loads without this program: weights, config, modeling
file, tokenizer and model card. The sampler head and the critic get a separate file, which sample.py --model takes."""

import json
from pathlib import Path

import safetensors.torch

from core.checkpoints.checkpoint import Checkpoint, load_checkpoint
from core.checkpoints.heads import started_heads
from core.checkpoints.hugging_face.tokenizer import tokenizer_config, tokenizer_description
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.sharing import CONFIG_FILE, WEIGHTS_FILE
from core.checkpoints.weights import build_model
from core.common.errors import UserError
from core.common.expressions import shown_names
from core.common.files import atomic_files, unwritable
from core.data.vocabulary import Vocabulary
from core.pretrained.head_file import MODULES, Base, save_head
from core.pretrained.loading import folder_hash
from model import GPT, GPTConfig

MODEL_TYPE, MODELING = 'masked_diffusion_gpt', 'modeling_masked_diffusion.py'
HEAD_PLACE = Path('heads') / 'head.safetensors'
_RECIPE = ('dataset', 'loss_weighting', 'noise_schedule', 'optimizer', 'learning_rate', 'batch_size',
           'gradient_accumulation_steps', 'block_size', 'ema_decay', 'dropout', 'seed')  # options that the card lists


def export_to_hugging_face(path: Path | str, folder: Path | str) -> tuple[Path, list[str]]:
    """Write the checkpoint at `path` into `folder`. Returns the folder and the names of its files.

    UserError if the checkpoint fills no masks in a whole window, or if the folder holds files that no earlier export of
    this kind wrote.
    """
    folder, checkpoint = Path(folder), load_checkpoint(path)
    model = build_model(checkpoint)
    if checkpoint.kind != CheckpointKind.UNMASKING or model.config.attention_type != 'bidirectional':
        raise UserError(f'{path} is a checkpoint of kind {checkpoint.kind!r} with {model.config.attention_type} '
                        f'attention; --to=hf writes diffusion models that read whole windows')
    _require_folder(folder)
    vocabulary = Vocabulary.from_meta(checkpoint.vocabulary)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()
               if name.startswith('transformer.')}
    files = {
        WEIGHTS_FILE: safetensors.torch.save(weights, {'format': 'pt'}),
        'tokenizer.json': _json(tokenizer_description(vocabulary)),
        'tokenizer_config.json': _json(tokenizer_config(model.config.block_size)),
        MODELING: Path(__file__).with_name(MODELING).read_bytes(),
        'README.md': model_card(checkpoint, model, Path(path).name).encode(),
        CONFIG_FILE: _json(_config(model.config))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    with atomic_files([folder / name for name in files]) as opened:
        for file, data in zip(opened, files.values()):
            file.write(data)
    return folder, [*files, *_write_heads(checkpoint, model, folder)]


def _write_heads(checkpoint: Checkpoint, model: GPT, folder: Path) -> list[str]:
    """Write the heads whose training had begun, for the base model in `folder`. Returns their file's name, if any."""
    sampler, critic, _ = started_heads(model.config, checkpoint.iteration)
    kept = tuple(name for name, begun in zip(MODULES, (sampler, critic)) if begun)
    if not kept:
        return []
    weights = {name: weight for name, weight in model.state_dict().items() if name.startswith(kept)}
    fields = {'add_sampler_head': sampler, 'add_critic_head': critic}
    try:
        (folder / HEAD_PLACE).parent.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(folder / HEAD_PLACE, error) from error
    save_head(folder / HEAD_PLACE, Base(folder.name, folder_hash(folder), False), (model.config, fields), weights,
              checkpoint.iteration)
    return [str(HEAD_PLACE)]


def _require_folder(folder: Path) -> None:
    """UserError unless `folder` is new, empty, or holds an earlier export of this kind."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f'cannot export to {folder}: it is a file; name a folder')
    try:
        earlier = json.loads((folder / CONFIG_FILE).read_bytes()).get('model_type') == MODEL_TYPE
    except (OSError, ValueError, AttributeError, RecursionError):
        earlier = False
    names = sorted(one.name for one in folder.iterdir())
    if names and not earlier:
        raise UserError(f'{folder} holds files that no export with --to=hf wrote ({shown_names(names)}); name a new or '
                        f'an empty folder')


def _config(config: GPTConfig) -> dict[str, object]:
    """The content of config.json."""
    module = MODELING.removesuffix('.py')
    return {'model_type': MODEL_TYPE, 'architectures': ['MaskedDiffusionForMaskedLM'],
            'auto_map': {'AutoConfig': f'{module}.MaskedDiffusionConfig',
                         'AutoModelForMaskedLM': f'{module}.MaskedDiffusionForMaskedLM'},
            'vocab_size': config.vocab_size, 'hidden_size': config.n_embd, 'num_hidden_layers': config.n_layer,
            'num_attention_heads': config.n_head, 'max_position_embeddings': config.block_size,
            'rotary': config.position_encoding == 'rotary', 'bias': config.bias, 'tie_word_embeddings': True,
            'mask_token_id': config.mask_token_id, 'pad_token_id': config.pad_token_id, 'dtype': 'float32'}


def _json(content: dict[str, object]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def model_card(checkpoint: Checkpoint, model: GPT, name: str) -> str:
    """README.md: what the model is, what it learnt from, how well it does, how to use it, and its limits."""
    config, options = model.config, checkpoint.config
    sizes = ', '.join(f'{split} {count:,}' for split, count in checkpoint.data_sizes.items()) or 'not recorded'
    bound = 'not recorded' if checkpoint.best_value is None else f'{checkpoint.best_value:.4f} nats per token'
    recipe = '\n'.join(f'| {key} | {options[key]} |' for key in _RECIPE if key in options)
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags:
- masked-diffusion
---

# {name}

A masked-diffusion language model of {model.parameter_count():,} parameters: {config.n_layer} layers,
{config.n_embd} channels, at most {config.block_size} tokens at once, {config.vocab_size} ids.

    from transformers import AutoModelForMaskedLM, AutoTokenizer
    model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)

`trust_remote_code` runs `{MODELING}`, a file in this folder; read it first.

## What it learnt from

Corpus `{options.get('dataset', 'not recorded')}`, tokens: {sizes}; SHA-256 of the token files
`{checkpoint.data_hash or 'not recorded'}`. Steps: {checkpoint.iteration:,}.

## How well it does

Lowest validation value (the NELBO, an upper bound on the negative log-likelihood): {bound}.

## Recipe

| option | value |
|---|---|
{recipe}

## Limits

It knows the text of its corpus and nothing else. Ids from {config.mask_token_id} on are special and stand for no
text: leave them out of a softmax. Tokens that are filled from one call are drawn without regard to each other; reveal
them over several calls, or use the heads in `heads/` with the program that trained it (`sample.py --model`).
"""
