"""Merge two models of one architecture: the weights lie on the line between theirs.

    python -m core.merging A B --weight=0.5 [--output=FILE]
"""

import argparse

from configurator import path_argument
from core.common.errors import run_script
from core.common.printing import say


def main(arguments: list[str]) -> None:
    """The command at the top of this file."""
    parser = argparse.ArgumentParser(prog='python -m core.merging',
                                     description='Interpolate two models of one architecture, and validate the result.')
    for name in ('first', 'second'):
        parser.add_argument(name)
    parser.add_argument('--weight', type=float, default=0.5, help="the second one's share, 0.5 by default")
    parser.add_argument('--output', help='ckpt_merged.pt in the folder of the first by default')
    parser.add_argument('--data_dir', help='folder of the corpora; where they were trained by default, if it is there')
    options = parser.parse_args(arguments)
    first, second = (path_argument(name, getattr(options, name)) for name in ('first', 'second'))
    output = first.with_name('ckpt_merged.pt') if options.output is None else path_argument('output', options.output)
    from core.interpolation import merge_checkpoints  # after the options, so that a typo is answered at once

    merge_checkpoints(first, second, options.weight, output, say, options.data_dir)


if __name__ == '__main__':
    run_script(main, lower=('the size of the models',))
