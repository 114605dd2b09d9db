"""Options that a run takes over unless others are given: a resumed run from its own start, training by policy gradient
from its generator."""

from collections.abc import Mapping
from pathlib import Path

from core.checkpoints.checkpoint import load_checkpoint
from core.checkpoints.heads import CRITIC, SAMPLER, started_heads
from core.checkpoints.helpers import read_generator
from core.checkpoints.run_folder import described_by, latest_checkpoint, read_json, require_run
from core.checkpoints.weights import TRAINING_FIELDS, model_config_from_dict
from core.common.errors import UserError
from core.common.runtime import resolve_device
from core.options import TrainConfig
from core.training_kinds import GRPO, training_of

OF_THIS_START = ('out_dir', 'init_from', 'eval_only', 'force_resume', 'overwrite')  # never taken from an earlier one


def inherited_options(config: TrainConfig, explicit: Mapping[str, str]) -> tuple[dict[str, object], str]:
    """The options that replace the defaults, and the file that holds them; none for most runs. `explicit` names the
    options given now. UserError if the file is missing or the run cannot continue from it."""
    if config.init_from == 'resume':
        return saved_options(config, explicit)
    if training_of(config) == GRPO and config.init_from_checkpoint:
        return start_options(config.init_from_checkpoint)
    return {}, ''


def start_options(path: str) -> tuple[dict[str, object], str]:
    """Shape, corpus and noise schedule of the generator at `path`, without its critic, and without a sampler head whose
    stage had not begun."""
    checkpoint = read_generator(path, 'init_from_checkpoint')
    schedule = TRAINING_FIELDS - {'sampler_min_neighbors_ratio'}
    taken = {name: value for name, value in checkpoint.model_config.items()
             if name not in schedule and name != CRITIC.added_by}
    taken |= {name: checkpoint.config[name] for name in ('dataset', 'noise_schedule') if name in checkpoint.config}
    shape = model_config_from_dict(checkpoint.model_config, path)
    return {**taken, SAMPLER.added_by: started_heads(shape, checkpoint.iteration)[0]}, path


def saved_options(config: TrainConfig, explicit: Mapping[str, str]) -> tuple[dict[str, object], str]:
    """The options that the run in `config.out_dir` was last started with, and the file that has them.

    That file is config.json, or the checkpoint if it was moved without one. A device that this machine lacks is left
    out. `explicit` names the options given now. UserError if the folder has neither file.
    """
    if not config.out_dir.strip():
        return {}, ''  # refused later, together with other problems
    source = described_by(Path(config.out_dir))
    options = read_json(source)
    if options is None:
        require_run(Path(config.out_dir), resume=True)
        source = latest_checkpoint(config.out_dir, lambda line: None)
        options = load_checkpoint(source).config
    taken = {name: value for name, value in options.items() if name not in OF_THIS_START}
    if 'device' not in explicit and 'device' in taken:
        try:
            resolve_device(str(taken['device']))
        except UserError:
            del taken['device']
    return taken, str(source)
