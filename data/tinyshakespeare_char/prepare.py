"""python data/tinyshakespeare_char/prepare.py [--input FILE]

nanoGPT's tiny Shakespeare in nanoGPT's split, downloaded or from FILE; it has no reference part.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from core.data.prepare import prepare_known  # noqa: E402
from core.common.errors import run_script  # noqa: E402

if __name__ == '__main__':
    run_script(lambda arguments: prepare_known('tinyshakespeare_char', arguments, ROOT / 'data'))
