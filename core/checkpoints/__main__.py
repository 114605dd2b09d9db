"""Check or share a checkpoint.

    python -m core.checkpoints verify out/ckpt.pt                read every byte again and say what the file holds
    python -m core.checkpoints export out/ckpt_best.pt FOLDER    weights as safetensors, the rest as JSON, for sharing
    python -m core.checkpoints export out/ckpt_best.pt FOLDER --to=hf    for the transformers library
"""

import argparse

from configurator import path_argument
from core.common.errors import run_script
from core.common.printing import say


def main(arguments: list[str]) -> None:
    """The commands at the top of this file."""
    parser = argparse.ArgumentParser(prog='python -m core.checkpoints', description='Check or share a checkpoint.')
    commands = parser.add_subparsers(dest='command', required=True)
    verify = commands.add_parser('verify', help='read every byte again and say what the file holds')
    export = commands.add_parser('export', help='weights as safetensors, the rest as JSON')
    for command in (verify, export):
        command.add_argument('checkpoint')
    export.add_argument('folder')
    export.add_argument('--to', choices=('own', 'hf'), default='own',
                        help='own: for this program; hf: for the transformers library, without this program')
    options = parser.parse_args(arguments)
    checkpoint = path_argument('checkpoint', options.checkpoint)
    from core.checkpoints.checkpoint import export_checkpoint, verify_checkpoint  # after the options, as in train.py
    from core.checkpoints.sharing import CONFIG_FILE, WEIGHTS_FILE

    if options.command == 'verify':
        summary = verify_checkpoint(checkpoint)
        say(f'{summary.path} is whole: {summary.kind}, iteration {summary.iteration}, '
              f'{summary.parameters:,} parameters, best value {summary.best_value}')
    elif options.to == 'hf':
        from core.checkpoints.hugging_face.export import export_to_hugging_face

        folder, names = export_to_hugging_face(checkpoint, path_argument('folder', options.folder))
        say(f'{checkpoint} exported to {folder}: {", ".join(names)}')
    else:
        folder = export_checkpoint(checkpoint, path_argument('folder', options.folder))
        say(f'{checkpoint} exported to {folder}: {WEIGHTS_FILE} and {CONFIG_FILE}')


if __name__ == '__main__':
    run_script(main, lower=('the size of the checkpoint',))
