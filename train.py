"""Train a masked-diffusion language model with sampler and critic heads, a causal one, a remasking model or a judge.

    python train.py config/train_char_diffusion_sampler.py                     the full recipe, GPU or CPU
    python train.py config/train_char_diffusion.py --max_iters=500             a config with one thing changed
    python train.py --init_from=resume --out_dir=out-remasking                 go on with a run, with its own options
    torchrun --nproc_per_node=2 train.py config/train_char_diffusion.py --gradient_accumulation_steps=2
    python train.py config/train_char_remasking.py                             a model that finds wrong tokens
    python train.py config/train_char_grpo.py                                  a trained generator, by reward
    python train.py config/train_head_on_pretrained.py --model=FOLDER --text_file=FILE    heads on another model's trunk
    python train.py --help                                                     every option
"""

from configurator import configure
from core.common.errors import raise_problems, run_script
from core.options import TrainConfig

MEMORY = ('batch_size', 'block_size', 'n_embd', 'n_layer')  # take less of it when lowered


def resolve_device(name: str) -> str:
    """The device that the option means. Torch is imported only here, so that a typo is answered at once."""
    from core.common.runtime import resolve_device

    return resolve_device(name)


def main(arguments: list[str]) -> None:
    """Read the options and train."""
    configuration = configure(TrainConfig, arguments, resolve_device=resolve_device, usage=__doc__)
    from core.head_training import train_head
    from core.pretrained.loading import pretrained_problems
    from core.resuming import inherited_options
    from core.trainer import train

    config = configuration.config
    if config.model is not None:
        config.device = resolve_device(config.device)
        train_head(config, configuration.explicit, configuration.notes)
        return
    raise_problems(pretrained_problems(config, {name: source for name, source in configuration.explicit.items()
                                                if name != 'predicts' or config.attention_type != 'block'}))
    inherited, source = inherited_options(config, configuration.explicit)
    if inherited:
        configuration = configure(TrainConfig, arguments, resolve_device=resolve_device, defaults=inherited,
                                  source=source)
        if configuration.config != config:
            configuration.notes.append(f'options that are not given are those of {source}')
        config = configuration.config
    config.device = resolve_device(config.device)
    train(config, configuration.notes)


if __name__ == '__main__':
    run_script(main, lower=MEMORY)
