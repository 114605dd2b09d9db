"""The options of evaluate.py."""

from dataclasses import dataclass
from typing import Literal

from configurator import option
from core.sampling.options import SampleConfig

RESULTS_PAGE = 'docs/results/study.md'


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of evaluate.py."""

    # what to measure
    out_dir: str = option('out', 'run folder that holds the checkpoint; results and pictures go there too', path=True)
    checkpoint_name: str = option('ckpt_best.pt', 'file in out_dir', path=True)
    checkpoints: str | None = option(
        None, 'of heads on one trunk, separated by commas, * for anything (arena)', path=True)
    dataset: str | None = option(None, "corpus; the checkpoint's own by default")
    data_dir: str | None = option(None, "folder of the corpora; the checkpoint's own by default, if it is there",
        path=True)
    split: Literal['val', 'train', 'ref'] = option('val', 'part of the corpus')
    # a model of Hugging Face's in place of the checkpoint (docs/pretrained.md)
    model: str | None = option(None, 'folder or hub name of a masked language model, in place of a checkpoint')
    text_file: str | None = option(None, 'the text that it is measured on', path=True)
    window_length: int | None = option(None, 'tokens of a window of text_file; 128, or the shortest line', minimum=1)
    sampler_head: str | None = option(None, 'sampler head that was trained on it: a .safetensors file', path=True)
    predicts: Literal['auto', 'own', 'next'] = option(
        'auto', 'of a causal architecture trained as a diffusion model: the position its hidden states predict')
    mask_token: str | None = option(None, 'its mask token, where the tokenizer names none')
    trust_remote_code: bool = option(False, 'run Python code that comes with the model; read it first')
    measure: str = option('all', 'one of the list above, or all')
    windows: int | None = option(
        None, 'windows of text; more for a smaller standard error (nelbo 512, likelihood 64, errors 256)',
        maximum=10**7)
    trunk_calls: list[float] | None = option(None, "budgets; each measure has its own by default")
    policies: str | None = option(None, 'sampling policies, separated by commas; each measure has its own by default')
    heads: str | None = option(None,
                               'none, wave, left_to_right: who fills a step; all there is by default (likelihood)')
    remasking_checkpoint_name: str | None = option(
        None, 'remasking model that also looks for errors (errors): file in out_dir, or path', path=True)
    # samples (measures quality, policies and curves)
    num_samples: int = option(16, 'texts per setting; more for narrower intervals', minimum=1, maximum=10**9)
    sequence_length: int | None = option(None, 'tokens per text; the block size by default', minimum=1, maximum=10**6)
    guidance: str | None = option(None,
                                  'critic, model (remasking_checkpoint_name), self, random: who guides the policy '
                                  'remask, separated by commas; self by default, as in sample.py')
    randomness_strength: float | None = option(
        None, "share that the policy remask takes back by chance; sample.py's by default", minimum=0.0, maximum=1.0)
    use_sampler_head: bool = option(True, 'False: masked positions are drawn independently')
    temperature: float = option(SampleConfig.temperature, 'of quality and policies')
    temperatures: list[float] = option([0.7, 1.0, 1.4, 2.0], 'of curves, which go through them to equal entropy')
    reference_checkpoint: str = option('out-reference/ckpt_best.pt', 'causal model that scores the samples', path=True)
    causal_checkpoint: str = option('out-ar/ckpt_best.pt', 'causal model whose samples are a control', path=True)
    report: str | None = option(
        None, 'write the tables of this page again; without --measure docs/results/study.md or docs/results/remasking.md',
        bare=RESULTS_PAGE, path=True)
    # the machine
    batch_size: int = option(64, 'windows or texts at once; lower it when memory runs out, the numbers stay the same',
        minimum=1, maximum=10**6)
    seed: int = option(1337, 'random orders follow from it', minimum=-2**63, maximum=2**63 - 1)
    device: str = option('auto', 'auto, cpu, cuda, cuda:1 ..., mps')
    dtype: Literal['float32', 'bfloat16', 'float16'] = option('float32', 'precision of the network')
