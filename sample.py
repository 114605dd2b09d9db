"""Generate text with a trained checkpoint.

    python sample.py --sampling_method=diffusion
    python sample.py --sampling_method=standard --max_new_tokens=100 --start_text="To be or not to be"
    python sample.py --infill_text="KING ____:" --temperature=0.6
    python sample.py --sampling_policy=maskgit --iterations=16
    python sample.py --remasking_checkpoint_name=out-remasking/ckpt_best.pt --randomness_strength=0.2
    python sample.py --serve=True
    python sample.py --help

An option that is given although it does not apply to the chosen method is an error; a default never is.
"""

from configurator import configure
from core.common.errors import run_script
from core.sampling.options import SampleConfig

MEMORY = ('batch_size', 'num_samples', 'sequence_length')  # take less of it when lowered


def usage() -> str:
    """The list of policies that --help shows."""
    from core.sampling.policy_options import policy_help

    return policy_help()


def main(arguments: list[str]) -> None:
    """Read the options and sample."""
    configuration = configure(SampleConfig, arguments, usage=usage)
    from core.sampling.run import run_sampling  # after the options, so that a typo is answered at once
    from core.sampling.serving import serve

    act = serve if configuration.config.serve else run_sampling
    act(configuration.config, configuration.explicit)


if __name__ == '__main__':
    run_script(main, lower=MEMORY)
