"""Small models, plans and states that many tests share."""

import math

import numpy as np
import torch

from core.batches import BatchPlan, RowShare
from core.checkpoints.checkpoint import Checkpoint, save_checkpoint
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.weights import model_config_to_dict
from core.common.drawing import allowed_ids
from core.common.runtime import Runtime
from core.noise import Masking, SeenNeighbours
from core.sampler_head import SamplerWindow
from core.training_step import StepSettings, TrainingState
from model import GPT, GPTConfig


CPU = Runtime(torch.device('cpu'), torch.float32, False)
V0 = 3  # base vocabulary of the toy
SPECIAL = {'mask_token_id': V0, 'wrong_token_id': V0 + 1, 'pad_token_id': V0 + 2, 'cls_token_id': V0 + 3}


def toy_config(**changes) -> GPTConfig:
    """A model over 3 tokens and sequences of 4; heads in stages at 2 and 4 where they are asked for."""
    values = {'block_size': 4, 'vocab_size': V0 + 4, 'n_layer': 1, 'n_head': 2, 'n_embd': 8, **SPECIAL, **changes}
    return GPTConfig(**values)


def awake(model: GPT, seed: int = 5) -> GPT:
    """`model` with every weight random, so that no branch is silent as it is at initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def toy_plan(**changes) -> BatchPlan:
    """Batches of the toy; `changes` to the fields of `BatchPlan`, `RowShare` and `Masking`, or corruption=..."""
    rows = {'batch_size': 4, **{name: changes.pop(name) for name in RowShare._fields if name in changes}}
    context = changes.pop('sampler_context', 0)
    neighbours = SeenNeighbours(SamplerWindow(context, context)) if context else None
    masking = {'mask_token_id': V0, 'loss_weighting': 'elbo', 'neighbours': neighbours,
               **{name: changes.pop(name) for name in Masking._fields if name in changes}}
    noise = changes.pop('corruption', None) or Masking(**masking)
    tokens = np.random.default_rng(0).integers(0, V0, 400).astype(np.uint16)
    values = {'tokens': tokens, 'seed': 1, 'block_size': 4, 'rows': RowShare(**rows), 'noise': noise, **changes}
    return BatchPlan(**values)


def toy_settings(**changes) -> StepSettings:
    """How the toy is trained."""
    values = {'optimizer': 'muon', 'learning_rate': 1e-2, 'weight_decay': 0.1, 'betas': (0.9, 0.99), 'grad_clip': 1.0,
              'ema_decay': 0.9, **changes}
    return StepSettings(**values)


def toy_state(config: GPTConfig, plan: BatchPlan, kind: str | None = None, runtime: Runtime = CPU,
              **changes) -> TrainingState:
    kind = kind or ('causal' if config.attention_type == 'causal' else 'unmasking')
    return TrainingState(awake(GPT(config, seed=3)), allowed_ids(config.vocab_size, V0),
                         runtime, plan, CheckpointKind(kind), toy_settings(**changes))


def save_model(path, vocabulary, model: GPT, kind: str = 'unmasking', iteration: int = 100, config=None) -> None:
    """A checkpoint of `model` at `path`; `config` are the run's options."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, Checkpoint(
        kind=kind, model_config=model_config_to_dict(model.config), config=config or {},
        vocabulary=vocabulary.to_meta(), vocabulary_hash=vocabulary.hash, data_hash='', data_sizes={},
        model=model.state_dict(), iteration=iteration).to_payload())


def model_over(vocabulary, seed: int = 3, **changes) -> GPT:
    """A small model with every weight random, over the ids of `vocabulary`."""
    values = {'block_size': 16, 'vocab_size': vocabulary.size, 'n_layer': 1, 'n_head': 2, 'n_embd': 16,
              'mask_token_id': vocabulary.mask_token_id, 'wrong_token_id': vocabulary.wrong_token_id,
              'pad_token_id': vocabulary.pad_token_id, 'cls_token_id': vocabulary.cls_token_id, **changes}
    return awake(GPT(GPTConfig(**values), seed=seed)).eval()


def model_that_knows(vocabulary, wrong: str, **changes) -> GPT:
    """A remasking model by construction: it calls the tokens in `wrong` wrong, whatever is around them.

    Its layers write nothing, so a hidden state is its token's embedding, a unit vector times the root of its width.
    """
    model = model_over(vocabulary, n_embd=4 * math.ceil(vocabulary.size / 4), **changes)
    ids = vocabulary.encode(wrong)
    with torch.no_grad():
        for block in model.transformer['h']:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.transformer['ln_f'].weight.fill_(1.0)
        weight = model.transformer['wte'].weight
        weight.copy_(torch.eye(*weight.shape))
        if model.classifier is not None:
            model.classifier.weight.zero_()
            model.classifier.bias[0], model.classifier.bias[1:] = 0.0, -8.0
            model.classifier.weight[-1, ids] = 4.0
        else:
            weight[vocabulary.wrong_token_id] = weight[ids].sum(0) * 3
    return model
