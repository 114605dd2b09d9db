"""The options of train.py."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Self

from configurator import option


@dataclass
class TrainConfig:
    """Every option of a training run; the defaults suit a small GPU."""

    # where and what
    out_dir: str = option('out', 'run folder: checkpoints, metrics, loss curve', path=True)
    dataset: str = option('shakespeare_char', 'corpus: a folder in data_dir; a missing one is prepared first')
    data_dir: str | None = option(None, 'folder of the corpora; default $MASKED_DIFFUSION_DATA_DIR, else data/ here',
        path=True)
    train_split: Literal['train', 'ref'] = option('train', 'ref is only for the reference model of evaluate.py')
    init_from: Literal['scratch', 'resume'] = option('scratch', 'resume continues exactly where the run stopped')
    init_from_checkpoint: str | None = option(
        None, 'start from the weights of this checkpoint; heads may differ (not read by init_from=resume)', path=True)
    overwrite: bool = option(False,
                             'start from scratch in a folder that holds a run; its files move to earlier_run_<date>')
    force_resume: bool = option(False, 'resume although the corpus has changed, or a checkpoint that the run reads')
    # heads on a model of Hugging Face's (docs/pretrained.md)
    model: str | None = option(None, 'folder or hub name of a masked language model; heads learn on its frozen trunk')
    text_file: str | None = option(None, 'text that they learn from', path=True)
    predicts: Literal['auto', 'own', 'next'] = option(
        'auto', 'for a diffusion model that began as a causal one: which position a hidden state predicts; auto is own '
        'for attention_type=block')
    mask_token: str | None = option(None, 'its mask token, if the tokenizer names none')
    trust_remote_code: bool = option(False, 'run Python code that comes with the model; read it first')
    # evaluation and output
    eval_interval: int = option(500, 'iterations between validations, each with a sample and a save',
        minimum=1, maximum=10**12)
    log_interval: int = option(50, 'iterations between console lines', minimum=1, maximum=10**12)
    eval_iters: int = option(16, 'batches per validation; more for a smaller standard error', minimum=1, maximum=10**6)
    eval_only: bool = option(False, 'validate once and stop')
    always_save_checkpoint: bool = option(False, 'save ckpt_best.pt at each validation, better or not')
    keep_snapshots: int = option(2, 'how many ckpt_<kind>_<iteration>.pt stay', minimum=1, maximum=10**6)
    sample_length: int = option(192, 'tokens of the sample printed at each validation; 0 prints none',
        minimum=0, maximum=10**6)
    wandb_log: bool = option(False, 'log to Weights & Biases too (WANDB_MODE=offline works)')
    wandb_project: str = option('masked-diffusion', 'W&B project')
    wandb_run_name: str = option('run', 'W&B run')
    # batches: gradient_accumulation_steps * batch_size * block_size tokens an iteration
    gradient_accumulation_steps: int = option(1, 'micro-steps an iteration over all ranks; raise when memory runs out',
        minimum=1, maximum=10**6)
    batch_size: int = option(32, 'rows of a micro-step; lower when memory runs out', minimum=1, maximum=10**6)
    block_size: int = option(256, 'tokens of context', minimum=1, maximum=10**6)
    # model
    n_layer: int = option(6, 'layers', minimum=1, maximum=1000)
    n_head: int = option(6, 'attention heads', minimum=1, maximum=1000)
    n_embd: int = option(384, 'channels', minimum=1, maximum=10**5)
    dropout: float = option(0.0, 'raise it when the model sees the corpus many times')
    bias: bool = option(False, 'biases in the trunk; they cost time and gain nothing')
    attention_type: Literal['bidirectional', 'causal', 'block'] = option(
        'bidirectional', 'causal trains from left to right; block trains blocks from left to right (docs/blocks.md)')
    block_length: list[int] = option(
        [], 'for attention_type=block: a length, or several that rows take in turn; 1 is causal, block_size one block')
    position_encoding: Literal['rotary', 'absolute'] = option('rotary', 'absolute learns one vector a position')
    # objective
    loss_weighting: Literal['masked_mean', 'elbo'] = option(
        'masked_mean', 'weighs all masked positions alike and learns faster (docs/LOG.md); elbo weighs them by 1 / t')
    block_length_from: list[int] = option(
        [], 'first iteration of each of several block lengths; 0 by default')
    whole_block_share: float = option(0.5, 'share of the rows that are masked entirely, as a block is when it begins')
    block_mask_shares: list[float] = option([0.0, 1.0], 'smallest and largest share of masks in the other rows')
    noise_schedule: str = option(
        'linear', 'share of masked positions over time: linear, cosine or geometric; it changes the estimate of the '
        'bound and the samplers, not the bound')
    # remasking models and judges (docs/remasking.md)
    training_type: Literal['unmasking', 'remasking', 'judge', 'grpo'] = option(
        'unmasking', 'remasking learns which tokens are wrong, judge learns their share, grpo learns from rewards')
    remasking_kind: Literal['token', 'binary', 'multiclass'] = option(
        'token', 'token predicts the token or the wrong id; binary: right or wrong; multiclass: right, or the source '
        'of a wrong token')
    remasking_loss_type: Literal['corrupted_only', 'all_positions', 'balanced'] = option(
        'corrupted_only', 'positions that count; only balanced and all_positions learn to tell right from wrong')
    remasking_corruption: Literal['random', 'shuffled', 'model', 'mixed'] = option(
        'random', 'wrong tokens drawn at random, from nearby places, by the model of corruption_checkpoint, or each way '
        'at a third of the places')
    corruption_checkpoint: str | None = option(None, 'generator whose errors are learned; judges learn random ones too',
        path=True)
    # policy gradients, training_type=grpo (docs/reinforcement.md)
    reward: str = option(
        'judge', "judge: the judge's score; line_ends: the share of lines that end with a punctuation mark")
    judge_checkpoint_name: str | None = option(None, 'the judge of reward=judge', path=True)
    repetition_weight: float = option(
        1.0, 'this times the share of repeated n-grams is subtracted from a reward', minimum=0)
    group_size: int = option(8, 'texts of one prompt that are compared with each other; batch_size is a multiple of it')
    prompt_length: int = option(16, 'tokens of the corpus that each text begins with; 0 for none', minimum=0)
    draw_policy: Literal['random', 'left_to_right', 'strided'] = option(
        'random', 'order of the draws; no order depends on the weights, so all models share a path')
    draw_calls: int = option(8, 'trunk calls for each text; more give better texts and slower steps', minimum=1)
    kl_weight: float = option(0.04, 'weight of the divergence from the starting model; raise it if texts degenerate',
        minimum=0)
    # sampler head (docs/sampler.md)
    add_sampler_head: bool = option(False, 'a small head that fills masks in waves')
    sampler_kind: str = option(
        'neighbours', 'which new tokens it sees: neighbours (those next to it), layer (all of the row, through an '
        'attention layer), layer_neighbours (both) or rerun (all, and the masks too)')
    start_sampler_iteration: int = option(0, 'its training begins here', minimum=0, maximum=10**12)
    sampler_context: int = option(1, 'neighbours it sees on each side')
    sampler_context_left: int | None = option(None, 'neighbours on the left; sampler_context by default')
    sampler_context_right: int | None = option(None, 'neighbours on the right; sampler_context by default')
    sampler_order: Literal['wave', 'left_to_right'] = option(
        'wave', 'order of a fill; with left_to_right it always sees its neighbours on the left')
    sampler_gate: bool = option(False, "learn which share of the trunk's logits to add, instead of adding all")
    sampler_gradient: Literal['head', 'trunk'] = option('head', "trunk lets its loss train the trunk too")
    sampler_output: Literal['own', 'shared_detached'] = option('own', 'shared_detached for a large vocabulary')
    sampler_residual: bool = option(True, "add its output to the trunk's logits")
    sampler_n_embd: int | None = option(None, 'its width; n_embd by default')
    sampler_attention_n_embd: int | None = option(None, 'width of its attention layer; n_embd by default')
    sampler_zero_hidden: bool = option(False, 'a control: it sees its neighbours and nothing of the trunk')
    sampler_min_neighbors_ratio: float = option(0.01, 'share of a fully masked row drawn first, without neighbours')
    # critic head (docs/training.md)
    add_critic_head: bool = option(False, 'a head that says which drawn tokens are wrong')
    start_critic_iteration: int = option(0, 'its training begins here', minimum=0, maximum=10**12)
    end_critic_iteration: int = option(0, 'its weight reaches critic_alpha here')
    critic_alpha: float = option(0.5, "weight of the critic's loss")
    critic_target_scope: Literal['masked_only', 'masked_and_ignore'] = option(
        'masked_only', 'masked_and_ignore also labels the visible tokens as right')
    critic_gradient: Literal['trunk', 'head'] = option('trunk', 'head stops its gradient before the trunk')
    critic_row_stride: int = option(1, 'train it on every n-th row; 4 makes stage 3 about a third cheaper')
    critic_fill: Literal['one_shot', 'revised'] = option(
        'one_shot', 'text that it learns from: masks filled once, or also revised as the policy remask does')
    # starting from another model
    freeze_transformer: bool = option(False, 'train the heads only')
    unfreeze_at_iteration: int | None = option(None, 'from here on the trunk trains too')
    unfreeze_lr_multiplier: float = option(0.1, "from then on with this share of the learning rate")
    # optimizer
    optimizer: Literal['muon', 'adamw'] = option('muon', 'muon for matrices (adamw for the rest), or adamw for all')
    learning_rate: float = option(6e-3, 'highest learning rate, of both optimizers')
    max_iters: int = option(5000, 'iterations', minimum=1, maximum=10**9)
    weight_decay: float = option(0.05, 'on matrices and embeddings')
    beta1: float = option(0.9, 'AdamW')
    beta2: float = option(0.99, 'AdamW; lower for large batches')
    grad_clip: float = option(1.0, 'largest gradient norm; 0 turns clipping off')
    skip_spikes: float = option(0.0, 'skip steps whose loss or gradient norm lies this many standard deviations above '
                                     'the last 128; 6 is usual, 0 skips only what is not finite')
    decay_lr: bool = option(True, 'half a cosine down to min_lr')
    warmup_iters: int = option(100, 'iterations of linear warm-up', minimum=0, maximum=10**12)
    lr_decay_iters: int = option(5000, 'where min_lr is reached; usually max_iters', minimum=0, maximum=10**12)
    min_lr: float = option(3e-4, 'about a twentieth of learning_rate')
    ema_decay: float = option(0.995, 'averaging of the weights that are validated and sampled; 0 turns it off')
    # machine
    seed: int = option(1337, 'initial weights, data order, corruption and dropout follow from it',
        minimum=-2**63, maximum=2**63 - 1)
    device: str = option('auto', 'auto, cpu, cuda, cuda:1 ..., mps')
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = option('auto', 'auto is bfloat16 where it is fast')
    compile: bool | None = option(None, 'torch.compile; None: where it pays')
    cuda_graphs: bool = option(False, 'on a CUDA GPU: record each kind of step once and replay it; not run on a GPU yet, '
                                      'so try first: python bench.py --gpu_checks')
    sharding: Literal['none', 'full'] = option(
        'none', 'full cuts weights, gradients and optimizer over the ranks (torchrun), for models that do not fit')
    activation_checkpointing: bool = option(
        False, "save memory: keep only each layer's input and compute the layer again in the backward pass")
    backend: Literal['nccl', 'gloo'] | None = option(None, 'of several ranks; None: nccl on GPUs, gloo on CPUs')

    @classmethod
    def of_checkpoint(cls, saved: Mapping[str, object]) -> Self:
        """The options of a checkpoint's run. Options that are newer than the run get their defaults. Options that no
        longer exist are left out."""
        names = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in names})
