"""python data/openwebtext/prepare.py                            OpenWebText, streamed (pip install datasets)
python data/openwebtext/prepare.py --input FILE or FOLDER ... any large text files in its place

GPT-2's BPE; <|endoftext|> in a file ends a document. Of every hundred passages 95 are train, 4 ref and 1 val.

--encoding=NAME         of the files, where it is not UTF-8
--data_dir=FOLDER       where corpora lie; default: $MASKED_DIFFUSION_DATA_DIR, else data/ of the program
--overwrite             replace the corpus that is there
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any folder

from core.common.errors import run_script  # noqa: E402


def main(arguments: list[str]) -> None:
    """Read the options and write the corpus."""
    from core.data.openwebtext import prepare_openwebtext

    prepare_openwebtext(arguments, __doc__)


if __name__ == '__main__':
    run_script(main, lower=('the amount of text',))
