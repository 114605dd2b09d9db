"""lm-evaluation-harness with the models of this program: its own command, where --model=masked_diffusion is known.

    python -m core.evaluation.harness run --model masked_diffusion --model_args out_dir=out,policy=margin \\
        --tasks my_task --include_path my_tasks
"""

from core.common.errors import UserError, run_script


def main(arguments: list[str]) -> None:
    """Register the model and let the harness read the command line."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError(f'this command needs the package lm_eval ({error}); install it: pip install lm_eval') from error
    import core.evaluation.harness.language_model  # noqa: F401  registers it

    cli_evaluate()


if __name__ == '__main__':
    run_script(main, lower=('batch_size',))
