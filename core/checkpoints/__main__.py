"""Check, share or convert a checkpoint.

    python -m core.checkpoints verify out/ckpt.pt                read every byte again and say what the file holds
    python -m core.checkpoints export out/ckpt_best.pt FOLDER    weights as safetensors, the rest as JSON, for sharing
    python -m core.checkpoints export out/ckpt_best.pt FOLDER --to=hf    for the transformers library
    python -m core.checkpoints convert OLD.pt NEW_FILE           from the older format (docs/names.md) to today's
"""

import argparse

from configurator import path_argument
from core.common.errors import run_script
from core.common.printing import say


def main(arguments: list[str]) -> None:
    """The commands at the top of this file."""
    parser = argparse.ArgumentParser(prog='python -m core.checkpoints',
                                     description='Check, share or convert a checkpoint.')
    commands = parser.add_subparsers(dest='command', required=True)
    verify = commands.add_parser('verify', help='read every byte again and say what the file holds')
    export = commands.add_parser('export', help='weights as safetensors, the rest as JSON')
    convert = commands.add_parser('convert', help="the older format with model_args and iter_num in today's")
    for command in (verify, export, convert):
        command.add_argument('checkpoint')
    export.add_argument('folder')
    export.add_argument('--to', choices=('own', 'hf'), default='own',
                        help='own: for this program; hf: for the transformers library, without this program')
    convert.add_argument('new_file')
    convert.add_argument('--meta', help='meta.pkl that the model was trained with; by default data/<dataset>/meta.pkl')
    options = parser.parse_args(arguments)
    checkpoint = path_argument('checkpoint', options.checkpoint)
    from core.checkpoints.checkpoint import export_checkpoint, verify_checkpoint  # options come first, as in train.py
    from core.checkpoints.sharing import CONFIG_FILE, WEIGHTS_FILE

    if options.command == 'verify':
        summary = verify_checkpoint(checkpoint)
        say(f'{summary.path} is whole: {summary.kind}, iteration {summary.iteration}, '
              f'{summary.parameters:,} parameters, best value {summary.best_value}')
    elif options.command == 'convert':
        from core.checkpoints.older import convert_checkpoint

        new = path_argument('new_file', options.new_file)
        meta = None if options.meta is None else path_argument('meta', options.meta)
        made = convert_checkpoint(checkpoint, new, meta)
        say(f'{checkpoint} converted to {new}: {made.kind}, iteration {made.iteration}; one can sample, evaluate and '
            f'initialise from it, but not resume')
    elif options.to == 'hf':
        from core.checkpoints.hugging_face.export import export_to_hugging_face

        folder, names = export_to_hugging_face(checkpoint, path_argument('folder', options.folder))
        say(f'{checkpoint} exported to {folder}: {", ".join(names)}')
    else:
        folder = export_checkpoint(checkpoint, path_argument('folder', options.folder))
        say(f'{checkpoint} exported to {folder}: {WEIGHTS_FILE} and {CONFIG_FILE}')


if __name__ == '__main__':
    run_script(main, lower=('the size of the checkpoint',))
