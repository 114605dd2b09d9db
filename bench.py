"""Measure training and sampling speed on this machine, with nothing else running.

    python bench.py                                    both shapes
    python bench.py --shapes=small --repetitions=9     one of them, with more rounds
    python bench.py --groups=policies                  one table only
    python bench.py --baseline                         with the yardsticks' rows in training and sampling
    python bench.py --json=docs/results/performance.json --report=docs/results/performance.md
    python bench.py --compare before.json after.json   two files of --json: how many times as fast each row became
    python bench.py --scaling                          memory and step time of other sizes
    python bench.py --scaling --sizes=small,large      of some of them
    python bench.py --gpu_checks --json=gpu.json       what must hold on a CUDA GPU
    python bench.py --time_to_nelbo                    seconds of training until a validation loss, and a plain GPT's
    python bench.py --help                             every option

docs/performance.md says what each figure means.
"""

from configurator import configure
from core.bench.options import BenchConfig
from core.common.errors import run_script
from core.common.printing import say


def main(arguments: list[str]) -> None:
    """Read the options and measure."""
    if any(argument.partition('=')[0] == '--compare' for argument in arguments):
        from core.bench.compare import run_comparison

        return run_comparison(arguments, say)
    configuration = configure(BenchConfig, arguments, usage=__doc__)
    from core.bench.report import run_benchmark  # after the options, so that a typo is answered at once
    from core.bench.scaling_run import run_scaling

    if configuration.config.gpu_checks is not None:
        from core.bench.gpu_checks import run_gpu_checks

        return run_gpu_checks(configuration.config, say)
    if configuration.config.time_to_nelbo is not None:
        from core.bench.time_to_loss import run_time_to_nelbo

        return run_time_to_nelbo(configuration.config, configuration.explicit, say)
    run = run_scaling if configuration.config.scaling else run_benchmark
    run(configuration.config, configuration.explicit, say)


if __name__ == '__main__':
    run_script(main, lower=('shapes', 'groups'))
