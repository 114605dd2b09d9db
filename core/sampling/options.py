"""The options of sample.py."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from configurator import option


class QualityMetric(StrEnum):
    """What is computed of the texts after generation: names of rows of `QUALITY_METRICS` in quality_metrics.py, where a
    new one is a row; 'none' for nothing."""

    NONE = 'none'
    SELF = 'self'
    JUDGE = 'judge'


@dataclass(frozen=True)
class SampleConfig:
    """The options of sample.py; nanoGPT's names where it has one."""

    # the checkpoint
    out_dir: str = option('out', 'run folder that holds the checkpoint', path=True)
    checkpoint_name: str = option('ckpt_best.pt', 'file in out_dir; ckpt.pt is the latest', path=True)
    remasking_checkpoint_name: str | None = option(
        None, 'remasking model that says what to take back: file in out_dir, or path',
        path=True)
    judge_checkpoint_name: str | None = option(None, 'judge of quality_metric=judge: file in out_dir, or path',
        path=True)
    # a model of Hugging Face's in place of the checkpoint (docs/pretrained.md)
    model: str | None = option(None, 'folder or hub name of a masked language model, in place of a checkpoint')
    sampler_head: str | None = option(None, 'sampler head that was trained on it: a .safetensors file', path=True)
    predicts: Literal['auto', 'own', 'next'] = option(
        'auto', 'of a causal architecture trained as a diffusion model: the position its hidden states predict')
    mask_token: str | None = option(None, 'its mask token, where the tokenizer names none')
    trust_remote_code: bool = option(False, 'run Python code that comes with the model; read it first')
    # what to write
    num_samples: int = option(4, 'number of texts', minimum=1, maximum=2**32)
    batch_size: int = option(16, 'texts generated at once; lower it when memory runs out, the texts stay the same',
        minimum=1, maximum=2**32)
    sequence_length: int | None = option(None, 'tokens per text; the block size by default, longer goes by blocks',
        minimum=1, maximum=10**6)
    max_new_tokens: int | None = option(None, 'tokens after start_text, in place of sequence_length',
        minimum=1, maximum=10**6)
    start_text: str = option('', r'prompt, never changed; \n is a line break, @FILE the text of a file',
                             alias='seed_text')
    seed_placement: Literal['prefix', 'random'] = option('prefix', 'where start_text goes in each text')
    infill_text: str = option('', r'text whose infill_char positions are to be filled; \n and @FILE as above')
    infill_char: str = option('_', 'one character that marks a position to fill in infill_text')
    # how to sample
    preset: str | None = option(
        None, 'fast, balanced, careful or varied: options measured together, printed when used; yours win (README)')
    sampling_method: Literal['diffusion', 'sampler', 'multinomial', 'standard'] = option(
        'diffusion', 'standard writes left to right; sampler insists on the sampler head')
    use_sampler_head: bool = option(True, 'False: diffusion draws all masked positions independently')
    sampling_policy: str = option('remask', 'which positions come when: see the list above')
    block_length: int | None = option(None, 'finish this many positions before the next; the block size by default',
        minimum=1, maximum=10**9)
    verify_drafts: bool = option(
        False, 'of a block model that knows blocks of 1: the head drafts, the causal model verifies, its own law '
        'exactly; of a head that reads rows: the trunk drafts, the head verifies')
    iterations: int = option(50, 'predictions per block; more revise more', alias='diffusion_iterations',
        minimum=1, maximum=10**6)
    temperature: float = option(0.8, 'below 1 is more careful, above 1 wilder, 0 takes the most probable token')
    top_p: float = option(1.0, 'draw from the smallest set of tokens that holds this probability; 1 is off')
    top_k: int | None = option(None, 'draw from this many most probable tokens; 0 is off', maximum=2**32)
    repetition_penalty: float = option(1.0, 'above 1 makes tokens already in the text less likely; 1 is off')
    # remasking (sampling_policy=remask)
    start_ratio: float = option(0.95, 'share of unprotected positions remasked first')
    end_ratio: float = option(0.05, 'share remasked last')
    schedule_type: str = option(
        'linear', 'way from start to end: linear or cosine; custom: by masking_ratios')
    masking_ratios: list[float] | None = option(None, 'shares of a custom schedule, one per remasking')
    schedule_mode: Literal['ratio', 'threshold'] = option(
        'ratio', 'threshold remasks whatever is wrong with more than the scheduled probability')
    start_threshold: float | None = option(
        None, 'wrongness above which a token is remasked, at first; 0.3 by default, 0.45 with a critic or a model')
    end_threshold: float | None = option(None, 'and at last; 0.7 by default, 0.85 with a critic or a model')
    guidance: str = option(
        'auto', 'who says what is wrong: model, critic, self or random; auto: the remasking model if one is named, else '
        'self-confidence')
    intelligent_remasking: bool = option(True, 'False: as guidance=random')
    randomness_strength: float = option(
        0.85, 'share of the remasked positions that is chosen at random all the same; less repeats what is common')
    # other policies
    idle_cache: bool = option(True, 'False: a trunk call also at steps that reveal nothing (mdlm, remdm_*)')
    choice_temperature: float = option(4.5, 'noise in the choice of positions, annealed to 0 (maskgit)')
    remdm_eta: float | None = option(None, 'remasking rate: 0.008 cap, 0.015 rescale, 0.02 loop (remdm_*)')
    loop_on: float = option(0.55, 'time, from 1 to 0, at which the loop begins (remdm_loop)')
    loop_off: float = option(0.05, 'time at which it ends (remdm_loop)')
    loop_alpha: float = option(0.9, 'share of revealed positions that it holds (remdm_loop)')
    planner_eta: float = option(1.0, '0 never takes old tokens back, above 1 rather than new ones (p2_*)')
    entropy_bound: float | None = option(
        None, 'nats; more reveals more at once (entropy_bounded); by default about 4 tokens a call, by the NELBO')
    confidence_threshold: float | None = option(
        None, 'probability; less reveals more at once (fast_dllm_threshold); by default about 4 tokens a call')
    parallel_factor: float = option(4.8, 'more reveals more at once (fast_dllm_factor)')
    selection_noise: float = option(0.5, 'noise in the choice of positions, annealed to 0 (token_critic)')
    # what to tell
    quality_metric: str = option(
        QualityMetric.SELF, "self: log-probability of what was written; judge: a judge model's score; none")
    confidence_groups: int = option(8, 'network calls that quality_metric=self takes per block; more is finer',
        minimum=1, maximum=10**6)
    show_progress: bool = option(True, 'progress bar on a terminal, elsewhere a line every tenth of the work')
    use_verbose_logging: bool = option(False, 'checks before the start, mask shares, first and last previews')
    log_debug: bool = option(False, 'a line per prediction and remasking')
    output_file: str | None = option(None, 'also write the texts to this file', path=True)
    save_json: str | None = option(None, 'write options, texts and every step to this file', path=True)
    save_html: str | None = option(None, 'write one page that replays every step in a browser to this file', path=True)
    save_gif: str | None = option(
        None, 'draw the first text condensing to this file: .gif moves, .png is a strip of a few steps', path=True)
    animate: bool = option(False, 'show the first text of each batch condensing in the terminal; slows a fast model')
    serve: bool = option(False, 'write texts on a page in the browser of this machine (docs/serving.md)')
    port: int = option(8000, 'of that page: http://127.0.0.1:8000; 0 takes a free one', minimum=0, maximum=65535)
    # the machine
    seed: int = option(1337, 'another seed, other texts', minimum=-2**63, maximum=2**63 - 1)
    device: str = option('auto', 'auto, cpu, cuda, cuda:1 ..., mps')
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = option(
        'auto', 'precision of the network; auto is bfloat16 on a GPU that has it, else float32')
    compile: bool = option(False, 'torch.compile the trunk, and on a GPU the waves; pays for many samples on a GPU')
    cuda_graphs: bool = option(False, 'on a CUDA GPU: record a wave of the sampler head once and replay it; not run on a '
                                      'GPU yet, so try first: python bench.py --gpu_checks')
