"""python data/custom/prepare.py my.txt [--tokens=characters|bpe] [--vocab_size=1024]

Any UTF-8 text of yours as the corpus `custom` (70 % train, 20 % ref, 10 % val); then train with --dataset=custom.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from core.data.prepare import prepare_own_text  # noqa: E402
from core.common.errors import run_script  # noqa: E402

if __name__ == '__main__':
    run_script(lambda arguments: prepare_own_text(arguments, ROOT / 'data'))
