"""A real model, really run: AntiBERTy (Ruffolo et al. 2021), which a wheel of the package index carries."""

import hashlib
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

pytest.importorskip('transformers')

from core.pretrained.loading import Source, load_pretrained

SHA256 = '30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a'
# The variable domain of a human heavy chain of germline IGHV3-23, with its two conserved cysteines masked.
HEAVY = ('EVQLVESGGGLVQPGGSLRLS_AASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYY'
         '_AKDRLSITIRPRYYGLDVWGQGTLVTVSS')


@pytest.mark.network
def test_the_conserved_cysteines_are_filled_in(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', str(tmp_path),
                    'antiberty==0.1.3'], check=True)
    wheel, = tmp_path.glob('*.whl')
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == SHA256
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    models = tmp_path / 'antiberty' / 'trained_models'
    shutil.copy(models / 'vocab.txt', models / 'AntiBERTy_md_smooth')
    base = load_pretrained(Source(str(models / 'AntiBERTy_md_smooth')), torch.device('cpu'))
    assert base.model.parameter_count() == 25_759_769 and base.vocabulary.base_size == 20
    words = base.vocabulary
    ids = torch.tensor([[words.mask_token_id if letter == '_' else words.encode(letter)[0] for letter in HEAVY]])
    with torch.no_grad():
        probabilities = base.model(ids).logits.masked_fill(~words.allowed, -torch.inf).softmax(-1)[0]
    for place in (HEAVY.index('_'), HEAVY.rindex('_')):
        assert words.decode([probabilities[place].argmax()]) == 'C' and probabilities[place].max() > 0.95
