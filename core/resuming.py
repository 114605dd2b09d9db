"""The options of a run that is resumed: those that it was started with, where no others are given."""

from collections.abc import Mapping
from pathlib import Path

from core.checkpoints.checkpoint import load_checkpoint
from core.checkpoints.run_folder import CONFIG, latest_checkpoint, read_json, require_run
from core.common.errors import UserError
from core.common.runtime import resolve_device
from core.options import TrainConfig

OF_THIS_START = ('out_dir', 'init_from', 'eval_only', 'force_resume', 'overwrite')  # never taken from an earlier one


def saved_options(config: TrainConfig, explicit: Mapping[str, str]) -> tuple[dict[str, object], str]:
    """The options that the run in `config.out_dir` was last started with, and the file that has them.

    That is its config.json, or the checkpoint where it was moved without one. A device that is not here is left out.
    `explicit` names the options given now. UserError where the folder has neither.
    """
    if not config.out_dir.strip():
        return {}, ''  # which is refused with whatever else is wrong
    source = Path(config.out_dir) / CONFIG
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
