"""The options that lm-evaluation-harness hands on to a model of this program: those of its --model_args."""

from dataclasses import dataclass
from typing import Literal

from configurator import option

USUAL_DRAWS = 128  # as many as LLaDA's own evaluation takes (Nie et al. 2025, arXiv 2502.09992)


@dataclass(frozen=True)
class HarnessConfig:
    """The options of --model_args; batch_size and device are usually options of the harness."""

    out_dir: str = option('out', 'run folder that holds the checkpoint', path=True)
    checkpoint_name: str = option('ckpt_best.pt', 'file in out_dir', path=True)
    model: str | None = option(None, 'folder or hub name of a masked language model, in place of a checkpoint')
    sampler_head: str | None = option(None, 'sampler head that was trained on it: a .safetensors file', path=True)
    predicts: Literal['auto', 'own', 'next'] = option(
        'auto', 'of a causal architecture trained as a diffusion model: the position its hidden states predict')
    mask_token: str | None = option(None, 'its mask token, where the tokenizer names none')
    trust_remote_code: bool = option(False, 'run Python code that comes with the model; read it first')
    measure: Literal['likelihood', 'nelbo'] = option(
        'likelihood', 'what is given as log-likelihood: the exact one of a policy, or the bound over all orders')
    policy: str = option('random', 'sampling policy that likelihoods and texts follow')
    trunk_calls: int | None = option(None, 'for each window or block; one for every token by default', minimum=1)
    draws: int = option(USUAL_DRAWS, 'random masks of measure=nelbo', minimum=1, maximum=10**6)
    block_length: int | None = option(None, 'of a block model; its longest by default', minimum=1)
    use_sampler_head: bool = option(True, 'False: masked positions are drawn independently')
    batch_size: int = option(16, 'rows at once; lower it when memory runs out, the numbers stay the same', minimum=1,
                             maximum=10**6)
    seed: int = option(1337, 'random orders, masks and draws follow from it', minimum=-2**63, maximum=2**63 - 1)
    device: str = option('auto', 'auto, cpu, cuda, cuda:1 ..., mps')
    dtype: Literal['float32', 'bfloat16', 'float16'] = option('float32', 'precision of the network')
