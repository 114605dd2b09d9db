"""python data/custom/prepare.py my.txt                                       your text as the corpus `custom`
python data/custom/prepare.py part1.txt part2.txt folder --name=novels     several texts in order as `novels`
python data/custom/prepare.py --nanogpt FOLDER --name=mine                 token files of nanoGPT as `mine`

Then train with --dataset=custom (or the name). A text goes to 70 % into train, 20 % into ref, 10 % into val.

--name=custom           name of the corpus, a folder of its own in the data folder
--tokens=characters     or bpe: a byte-level BPE learnt from the train part
--vocab_size=1024       most tokens of the BPE, 256 to 65536
--encoding=NAME         of the files, where it is not UTF-8 (UTF-16 with its mark is recognised): cp1252, latin-1, ...
--data_dir=FOLDER       where corpora lie; default: $MASKED_DIFFUSION_DATA_DIR, else data/ of the program
--overwrite             replace another corpus of this name
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any folder

from core.common.errors import run_script  # noqa: E402


def main(arguments: list[str]) -> None:
    """Read the options and write the corpus."""
    from core.data.own_text import prepare_own_text

    prepare_own_text(arguments, __doc__)


if __name__ == '__main__':
    run_script(main, lower=('the amount of text',))
