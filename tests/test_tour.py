"""The notebook docs/tour.ipynb: what is committed, and that every cell works."""

import re
from pathlib import Path

import numpy as np
import pytest

from core.data.learning import character_vocabulary
from core.data.writing import write_corpus
from helpers.plain_words import hard_words
from helpers.tour import TOUR, commands_of_tour, sources, tour

ROOT = Path(__file__).parent.parent
LARGEST = 400_000  # bytes
SHORTER = {'ITERATIONS = 900': 'ITERATIONS = 12', 'ITERATIONS // 6': '1', '--eval_iters=8': '--eval_iters=1',
           'READER_ITERATIONS, TEXTS = 400, 16': 'READER_ITERATIONS, TEXTS = 4, 8', 'READER_ITERATIONS // 4': '1',
           '--device=cpu --out_dir=out-tour/model --overwrite': '--n_layer=1 --n_embd=32 --warmup_iters=1 --device=cpu '
                                                                '--out_dir=out-tour/model --overwrite'}


def test_the_tour_was_run_from_top_to_bottom_without_an_error():
    book = tour()
    assert book['nbformat'] == 4 and len({cell['id'] for cell in book['cells']}) == len(book['cells'])
    code = [cell for cell in book['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell['outputs'] for cell in code[1:]), 'run it again, and commit its outputs'
    outputs = [output for cell in code for output in cell['outputs']]
    assert {output['output_type'] for output in outputs} <= {'stream', 'display_data', 'execute_result'}
    assert sum('image/png' in output.get('data', ()) for output in outputs) == 3
    assert TOUR.stat().st_size < LARGEST
    shown = re.sub(r'"image/png": "[^"]*"', '', TOUR.read_text(encoding='utf-8'))
    assert not re.search(r'/(tmp|home|root|work|Users)/', shown)


def test_what_the_tour_says_is_plain_and_its_links_lead_somewhere():
    text = '\n'.join([*sources('markdown'), *sources('code')])
    assert not hard_words(text)
    links = re.findall(r'\]\(([^)#]+)\)', text)
    assert len(links) >= 5 and all((TOUR.parent / link).exists() for link in links)


def test_the_tour_trains_samples_fills_doubts_and_compares():
    commands = commands_of_tour()
    scripts = [command.split()[0] for command in commands]
    assert scripts == ['train.py', 'sample.py', 'sample.py', 'train.py', 'evaluate.py']
    assert '--infill_text=' in commands[2] and '--measure=curves' in commands[4]
    assert all('out-tour/' in command and '--device=cpu' in command for command in commands)


@pytest.mark.long
def test_every_cell_works(tmp_path, data_here):
    """In a kernel, with few iterations, on a made-up corpus of the name and the letters that the notebook uses."""
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    pytest.importorskip('ipykernel')
    words = sorted(set(' '.join(sources('code')).split()))
    text = ' '.join(np.random.default_rng(1).choice(words, 6000))
    third = len(text) // 3
    parts = {'train': text[:third], 'ref': text[third:2 * third], 'val': text[2 * third:]}
    write_corpus(data_here / 'shakespeare_char', character_vocabulary(text), parts, 'made up')
    for name in ('config', 'core', 'model.py', 'sample_utils.py', 'configurator.py', 'train.py', 'sample.py',
                 'evaluate.py'):
        (tmp_path / name).symlink_to(ROOT / name)
    book = nbformat.read(TOUR, as_version=4)
    nbformat.validate(book)
    changed = dict.fromkeys(SHORTER, False)
    for cell in book.cells:
        for long, short in SHORTER.items():
            changed[long] |= long in cell.source
            cell.source = cell.source.replace(long, short)
    assert all(changed.values())
    nbclient.NotebookClient(book, timeout=600, resources={'metadata': {'path': str(tmp_path)}}).execute()
    shown = [output for cell in book.cells if cell.cell_type == 'code' for output in cell.outputs]
    assert sum('image/png' in output.get('data', ()) for output in shown) == 3
    made = {path.name for path in (tmp_path / 'out-tour').iterdir()}
    assert made == {'model', 'reader', 'writing.gif', 'writing.html'}
