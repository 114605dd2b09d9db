"""The options of bench.py."""

from dataclasses import dataclass
from typing import Literal

from configurator import option


@dataclass
class BenchConfig:
    """The options of bench.py."""

    shapes: str = option('small,large', 'which of them, with a comma between; medium and gpt2 are for a GPU')
    groups: str = option('training,fill,sampling,policies', 'what to measure, with a comma between')
    repetitions: int | None = option(None, 'rounds per group; None: 5, or 3 where they take long')
    baseline: bool = option(False, "measure the yardsticks beside: an eager float32 GPT's step, a cached causal decode",
                            bare='True')
    critic_row_stride: int = option(4, 'stage 3 trains the critic on every n-th row; 4 as in the full recipe')
    device: str = option('auto', 'auto, cpu, cuda, cuda:1 ...')
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = option(
        'auto', 'precision of training and sampling; auto chooses as train.py and sample.py do')
    compile: bool | None = option(None, 'torch.compile the training step; None: where it pays')
    json: str | None = option(None, 'write every measured number to this file')
    report: str | None = option(None, 'write the tables into this file, between its two marker lines')
    from_json: str | None = option(None, 'measure nothing, show what --json wrote earlier')
