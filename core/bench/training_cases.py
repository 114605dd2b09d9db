"""Rows of a benchmark that train: a step of each kind, a step of the yardstick, and the least work of a step.

The model is untrained and the corpus is random: time depends on shapes only.

Letters: B rows, T sequence length, V vocabulary, D width, C neighbours, W width of the sampler head.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from core.batches import BatchPlan, RowShare
from core.bench.cases import Case, Shape, base_vocabulary, model_config
from core.bench.sampling_cases import fill_operations
from core.bench.yardstick import Baseline, BaselineTraining, Form
from core.checkpoints.kinds import CheckpointKind
from core.common.runtime import Runtime, has_fast_bfloat16
from core.noise import BlockNoise, Masking, seen_neighbours
from core.optimizer import is_matrix
from core.training_step import StepSettings, TrainingState, training_step
from model import GPT, GPTConfig

TOKENS = 1_000_000  # of the made-up corpus
TRAINING = StepSettings('muon', learning_rate=1e-3, weight_decay=0.05, betas=(0.9, 0.99), grad_clip=1.0,
                        ema_decay=0.995)


def training_cases(shape: Shape, runtime: Runtime, critic_row_stride: int) -> dict[str, Case]:
    """One training step of each kind, each on its own model: causal, stage 1 (main loss, no heads), stage 2 (with the
    sampler head), stage 3 (also with the critic), and block diffusion (two streams, no heads)."""
    sampler = {'add_sampler_head': True}
    critic = {**sampler, 'add_critic_head': True, 'critic_row_stride': critic_row_stride}
    configs = {'causal': model_config(shape, attention_type='causal'), 'stage 1': model_config(shape),
               'stage 2': model_config(shape, **sampler), 'stage 3': model_config(shape, **critic),
               'block': model_config(shape, attention_type='block', block_length=(8,))}
    return {name: Case(_training_run(config, shape, runtime), step_operations(config, shape), shape.tokens,
                       runtime.dtype, step_bytes(config, shape, runtime.dtype))
            for name, config in configs.items()}


def training_plan(config: GPTConfig, shape: Shape) -> tuple[CheckpointKind, BatchPlan]:
    """The kind of a model of `model_config`, and the plan of its batches."""
    kind = {'causal': CheckpointKind.CAUSAL, 'bidirectional': CheckpointKind.UNMASKING,
            'block': CheckpointKind.BLOCK}[config.attention_type]
    masking = Masking(shape.base_size, 'elbo', seen_neighbours(config),
                      config.critic_row_stride, config.critic_target_scope,
                      blocks=BlockNoise(config.block_length) if config.block_length else None)
    return kind, BatchPlan(made_up_tokens(shape.base_size), 1, shape.block_size, RowShare(shape.batch_size), masking)


def _training_run(config: GPTConfig, shape: Shape, runtime: Runtime) -> Callable[[int], object]:
    kind, plan = training_plan(config, shape)
    model = GPT(config).to(runtime.device)
    state = TrainingState(model, base_vocabulary(config, runtime.device), runtime, plan, kind, TRAINING)
    return lambda iteration: training_step(state, iteration, TRAINING.learning_rate)


def baseline_cases(shape: Shape, runtime: Runtime) -> dict[str, Case]:
    """A training step of the yardstick (core/bench/yardstick.py) with the same shape, in each of its forms. The fastest
    form counts."""
    operations = step_operations(model_config(shape, attention_type='causal'), shape)
    found = {}
    for form in baseline_forms(runtime):
        model = Baseline(shape.block_size, shape.vocabulary_size, shape.n_layer, shape.n_head, shape.n_embd)
        training = BaselineTraining(model.to(runtime.device), made_up_tokens(shape.base_size), shape.batch_size,
                                    shape.block_size, form)
        found[form.name] = Case(_numbered(training), operations, shape.tokens, form.dtype, baseline_bytes(model, shape))
    return found


def baseline_forms(runtime: Runtime) -> list[Form]:
    """The forms of the yardstick. float32, except on a GPU with fast bfloat16; bfloat16, if that is fast. Each is
    eager, and also compiled if this program's steps are."""
    fast = has_fast_bfloat16(runtime.device)
    dtypes = ([torch.float32] if runtime.device.type == 'cpu' or not fast else []) + ([torch.bfloat16] if fast else [])
    return [Form(dtype, compile) for dtype in dtypes for compile in ([False, True] if runtime.compile else [False])]


def _numbered(training: BaselineTraining) -> Callable[[int], object]:
    return lambda _: training.step()


def made_up_tokens(base_size: int) -> np.ndarray:
    """uint16 [TOKENS], every id of the base vocabulary equally likely."""
    return np.random.default_rng(0).integers(0, base_size, TOKENS, dtype=np.uint16)


# Operations ---------------------------------------------------------------------------------------------------------

def step_operations(config: GPTConfig, shape: Shape) -> float:
    """Operations of a training step's matrix products: those of three trunk calls (one forward, two for the backward
    pass) and of the heads, without the optimizer's. Half the positions count as masked.

    A causal step counts like a bidirectional one, as is usual.
    """
    with torch.device('meta'):
        trunk = GPT(config).operations_per_token()
    D, V, masked = config.n_embd, config.vocab_size, shape.tokens / 2
    operations = 3.0 * trunk * shape.tokens * (2 if config.attention_type == 'block' else 1)  # streams
    if config.add_sampler_head:  # its input is detached, so the first matrix has one product less in the backward pass
        first = (config.sampler_window.size + 1) * D * D
        operations += masked * 2 * (2 * first + 3 * D * D + (3 if config.sampler_output == 'own' else 2) * D * V)
    if config.add_critic_head:  # the trunk also reads the filled-in text, on a share of the rows
        share = math.ceil(shape.batch_size / config.critic_row_stride) / shape.batch_size
        operations += share * (masked * fill_operations(config) + 3.0 * trunk * shape.tokens)
    return operations


# Bytes --------------------------------------------------------------------------------------------------------------
#
# Between two matrix products there is one fused pass. It reads what the earlier products wrote, and writes what the
# later ones read. Its backward pass reads its inputs and the gradients of its outputs, and writes the gradients of its
# inputs. The matrix rate already counts what a product moves. Values per position and layer, in units of the width:

NORM = (2 + 2) + (3 + 1)  # forward reads the stream and what a product adds to it, and writes the new stream and its
# norm; backward reads the stream and the gradients of both outputs, and writes one gradient, which both inputs share
ROTATION = (2 + 2) + (4 + 2)  # queries and keys, normalised and rotated together
ACTIVATION = (4 + 4) + (8 + 4)  # of the four times wider part
LOSS = 1 + (1 + 1)  # logits, in units of the vocabulary: read; read again, and their gradient written
HEAD = 2 * ((1 + 1) + (2 + 1))  # the sampler head's two activations with their norms, in units of its width

# The optimizer, in float32 values per weight. The gradient is read for its norm and again for the update. The update
# reads and writes the weight, the moments and the average of the weights.
GRADIENT, MOMENT, WEIGHT = 1 + 1, 1 + 1, 1 + 1


def step_bytes(config: GPTConfig, shape: Shape, dtype: torch.dtype) -> float:
    """The least bytes that a training step moves outside its matrix products, with activations in `dtype`.

    Muon keeps one moment and AdamW two; both come with an average of the weights. Half the positions count as masked.
    In stage 3 the trunk's second reading counts, but not the drawing of tokens.
    """
    D, V, W = config.n_embd, config.vocab_size, config.sampler_n_embd or config.n_embd
    read = shape.tokens * (2 if config.attention_type == 'block' else 1)  # streams
    trunk = float(read * config.n_layer * (2 * NORM + ROTATION + ACTIVATION) * D)
    predicted = shape.tokens if config.attention_type == 'causal' else shape.tokens / 2
    values = trunk + predicted * LOSS * V
    if config.add_sampler_head:  # its input is gathered: read and written once
        values += predicted * (2 * (config.sampler_window.size + 1) * D + HEAD * W + LOSS * V)
    if config.add_critic_head:
        values += math.ceil(shape.batch_size / config.critic_row_stride) / shape.batch_size * trunk
    with torch.device('meta'):
        weights = {name: weight for name, weight in GPT(config).named_parameters()}
    moments = sum(weight.numel() * (MOMENT if is_matrix(name, weight) else 2 * MOMENT)
                  for name, weight in weights.items())
    held = sum(weight.numel() for weight in weights.values()) * (GRADIENT + 2 * WEIGHT) + moments
    return values * dtype.itemsize + held * torch.float32.itemsize


def baseline_bytes(model: Baseline, shape: Shape) -> float:
    """As `step_bytes` for the yardstick: no rotation, AdamW throughout, no average of the weights."""
    values = shape.tokens * (shape.n_layer * (2 * NORM + ACTIVATION) * shape.n_embd + LOSS * shape.vocabulary_size)
    weights = sum(weight.numel() for weight in model.parameters())
    return float(torch.float32.itemsize * (values + weights * (GRADIENT + 2 * MOMENT + WEIGHT)))
