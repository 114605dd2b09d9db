"""python data/openwebtext/prepare.py [--input FILE ...]

OpenWebText in GPT-2's BPE, streamed through the package datasets (pip install datasets; tens of gigabytes), or any
large text files in its place; <|endoftext|> in a file ends a document. Of every hundred passages 95 are train, 4 ref
and 1 val.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from core.common.errors import run_script  # noqa: E402
from core.data.openwebtext import prepare_openwebtext  # noqa: E402

if __name__ == '__main__':
    run_script(lambda arguments: prepare_openwebtext(arguments, ROOT / 'data'))
