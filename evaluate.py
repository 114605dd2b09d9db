"""Measure a trained checkpoint on held-out text (docs/evaluation.md).

    python evaluate.py                                                     every measure of out/ckpt_best.pt
    python evaluate.py --measure=nelbo --split=train
    python evaluate.py --measure=likelihood --policies=random,margin --trunk_calls="[1,2,4,8]"
    python evaluate.py --measure=quality --num_samples=64 --temperature=1.0
    python evaluate.py --measure=policies --report=docs/results/policies.md
    python evaluate.py --measure=arena --checkpoints="out-arena/*/ckpt.pt" --report=docs/results/arena.md
    python evaluate.py --report                                  write the tables of docs/results/study.md again
    python evaluate.py --help

Results are kept in evaluation.json in the run folder, so a rerun computes only what is new.
"""

from configurator import configure
from core.common.errors import run_script
from core.evaluation.options import EvaluateConfig

MEMORY = ('batch_size', 'num_samples', 'windows', 'sequence_length')  # take less of it when lowered


def usage() -> str:
    """The head of this file, and the list of measures that --help shows."""
    from core.evaluation.run import measure_help

    return f'{__doc__}\n{measure_help()}'


def main(arguments: list[str]) -> None:
    """Read the options and measure."""
    configuration = configure(EvaluateConfig, arguments, usage=usage)
    from core.evaluation.run import run_evaluation  # after the options, so that a typo is answered at once
    from core.study.arena import write_arena
    from core.study.run import write_study

    if configuration.config.measure == 'arena':
        write_arena(configuration.config, configuration.explicit)
    elif configuration.config.report is not None and 'measure' not in configuration.explicit:
        write_study(configuration.config)
    else:
        run_evaluation(configuration.config, configuration.explicit)


if __name__ == '__main__':
    run_script(main, lower=MEMORY)
