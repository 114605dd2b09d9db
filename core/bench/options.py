"""The options of bench.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from configurator import option

TIME_TO_NELBO = '2.5,2.2,2,1.8,1.6,1.5'  # nats per token
FILES = ('json', 'report', 'from_json')  # options of both measurements


@dataclass(frozen=True)
class BenchConfig:
    """The options of bench.py."""

    shapes: str = option('small,large', 'models to measure, separated by commas; medium and gpt2 are for a GPU')
    groups: str = option('training,fill,sampling,policies', 'what to measure, separated by commas')
    repetitions: int | None = option(None, 'rounds per group; None: 5, or 3 if they take long',
        minimum=1, maximum=10**6)
    baseline: bool = option(False, "measure the yardsticks too: a plain GPT's step in all its forms, cached decoding",
                            bare='True')
    critic_row_stride: int = option(4, 'stage 3 trains the critic on every n-th row; 4 as in the full recipe')
    device: str = option('auto', 'auto, cpu, cuda, cuda:1 ...')
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = option(
        'auto', 'precision of training and sampling; auto chooses as train.py and sample.py do')
    compile: bool | None = option(None, 'torch.compile the training step; None: if it pays')
    scaling: bool = option(False, 'measure memory and step time of other sizes instead', bare='True')
    sizes: str | None = option(None, 'with --scaling: sizes to measure, separated by commas; None: all')
    gpu_checks: str | None = option(None, 'check what must hold on a CUDA GPU instead: all, or names separated by '
                                    'commas', bare='all')
    time_to_nelbo: str | None = option(None, 'train on a corpus and say after how many seconds the validation loss falls '
                                       'to these nats per token', bare=TIME_TO_NELBO)
    dataset: str = option('shakespeare_char', 'with --time_to_nelbo: the corpus')
    iterations: int | None = option(None, "with --time_to_nelbo: length of each training; by default the recipe's",
                                    minimum=2, maximum=10**7)
    json: str | None = option(None, 'write every measured number to this file', path=True)
    report: str | None = option(None, 'write the tables into this file, between its two marker lines', path=True)
    from_json: str | None = option(None, 'measure nothing; show what --json wrote earlier', path=True)


def measurement_problems(explicit: Mapping[str, str], scaling: bool) -> list[str]:
    """Complaints about options that belong to another measurement than the chosen one."""
    if scaling:
        return [f'{name} does not apply to --scaling; leave one of them out' for name in explicit
                if name not in ('scaling', 'sizes', *FILES)]
    owners = {'sizes': 'scaling', 'dataset': 'time_to_nelbo', 'iterations': 'time_to_nelbo'}
    return [f'{name} is of --{owner}, which was not given; leave it out or give both'
            for name, owner in owners.items() if name in explicit]
