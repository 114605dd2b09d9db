"""python data/tinyshakespeare_char/prepare.py [--input FILE]

nanoGPT's tiny Shakespeare in nanoGPT's split; it has no reference part.

--input FILE            the text, where it cannot be downloaded
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

    prepare_known('tinyshakespeare_char', arguments, __doc__)


if __name__ == '__main__':
    run_script(main)
