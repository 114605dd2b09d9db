"""evaluate.py with --model: likelihoods against a plain computation with the library's own calls, and how a text file
is cut into windows."""

import math
from itertools import permutations

import pytest
import torch

pytest.importorskip('transformers')

from configurator import configure
from core.checkpoints.kinds import CheckpointKind
from core.common.errors import UserError
from core.data.learning import character_vocabulary
from core.evaluation.options import EvaluateConfig
from core.evaluation.run import run_evaluation
from core.pretrained.loading import Source, load_pretrained
from core.pretrained.text import read_text, text_corpus
from helpers.pretrained import save_tiny
from helpers.toys import model_over, save_model

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('models')
    return {kind: save_tiny(kind, root / kind) for kind in ('bert', 'esm')}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'words.txt').write_text('the king says to be\nor not to be the queen says\n' * 6)
    (tmp_path / 'proteins.txt').write_text('MKTAYI\nAKQ\nRQISFVK\n\nLAGVSE\n')
    return tmp_path


def evaluate(*arguments):
    configuration = configure(EvaluateConfig, ['--device=cpu', *arguments])
    lines = []
    return run_evaluation(configuration.config, configuration.explicit, lines.append), '\n'.join(lines)


def library_terms(folder, texts, order):
    """Nats of each text int64 [T] when its positions are revealed one by one in `order`, by the library's own calls,
    the softmax over what a text may consist of."""
    import transformers as library

    base = load_pretrained(Source(str(folder)), CPU)
    model = library.AutoModelForMaskedLM.from_pretrained(folder).eval()
    (begin,), (end,), mask = base.model.framing.before, base.model.framing.after, base.vocabulary.mask_token_id
    found = []
    for text in texts.tolist():
        shown, nats = [mask] * len(text), 0.0
        for place in order:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[begin, *shown, end]])).logits[0, place + 1]
            nats -= logits.masked_fill(~base.vocabulary.allowed, -math.inf).log_softmax(-1)[text[place]].item()
            shown[place] = text[place]
        found.append(nats)
    return torch.tensor(found)


def test_the_likelihood_is_the_librarys_own_step_by_step(folders, here):
    found, said = evaluate(f'--model={folders["esm"]}', '--text_file=proteins.txt', '--measure=likelihood',
                           '--policies=left_to_right', '--trunk_calls=[6]', '--window_length=6')
    base = load_pretrained(Source(str(folders['esm'])), CPU)
    texts = torch.tensor([base.vocabulary.encode(line) for line in ('MKTAYI', 'RQISFV', 'LAGVSE')])
    expected = library_terms(folders['esm'], texts, range(6)) / 6
    (row,) = found['likelihood']
    assert row['window_nats'] == pytest.approx(expected.tolist(), abs=2e-5)
    assert row['unit'] == 'character' and row['bits'] == pytest.approx(row['nats'] / math.log(2))
    assert '3 lines, each a text of its own, cut to 6 tokens; 1 shorter ones are left out' in said
    assert (here / 'out-pretrained' / 'evaluation.json').is_file()


def test_the_bound_is_the_mean_over_all_orders(folders, here):
    """With windows of two tokens the bound is an average over two orders; 512 windows' noise is averaged out."""
    (here / 'pairs.txt').write_text('MK\n' * 400)
    found, _ = evaluate(f'--model={folders["esm"]}', '--text_file=pairs.txt', '--measure=nelbo', '--windows=400')
    base = load_pretrained(Source(str(folders['esm'])), CPU)
    pair = torch.tensor([base.vocabulary.encode('MK')])
    orders = torch.stack([library_terms(folders['esm'], pair, order) for order in permutations(range(2))]) / 2
    (row,) = found['nelbo']
    assert abs(row['nats'] - orders.mean().item()) < 5 * row['standard_error'] + 1e-4
    assert row['standard_error'] < 0.2


def test_errors_and_samples_are_measured_too(folders, here):
    model = [f'--model={folders["bert"]}', '--text_file=words.txt', '--window_length=8', '--out_dir=found']
    found, _ = evaluate(*model, '--measure=errors', '--windows=40')
    assert {row['detector'] for row in found['errors']} == {'random', 'self_confidence', 'pseudo_likelihood'}
    found, _ = evaluate(*model, '--measure=quality', '--num_samples=10', '--policies=random', '--trunk_calls=[2,4]',
                        '--sequence_length=12')
    assert {row['wanted_calls'] for row in found['quality'] if 'wanted_calls' in row} == {2, 4}
    assert (here / 'found' / 'evaluation.json').is_file()


def test_curves_need_a_reference_model_that_reads_the_same_characters(folders, here):
    model = [f'--model={folders["bert"]}', '--text_file=words.txt', '--window_length=8', '--out_dir=found',
             '--measure=curves', '--num_samples=10', '--policies=random', '--trunk_calls=[2]', '--sequence_length=12',
             '--temperatures=[0.5,2.0]']
    with pytest.raises(UserError, match='curves compare bits under a reference model, and .* does not exist'):
        evaluate(*model)
    characters = character_vocabulary('the king says to be or not to be the queen says,.#a?[]MASKUNCLEP\n')
    save_model(here / 'reference.pt', characters, model_over(characters, attention_type='causal', block_size=64),
               CheckpointKind.CAUSAL)
    found, said = evaluate(*model, '--reference_checkpoint=reference.pt')
    rows = [row for row in found['curves'] if row.get('policy') == 'random']
    assert {row['temperature'] for row in rows} == {0.5, 2.0}
    assert all(row['reference_bits'] > 0 for row in rows) and rows[0]['entropy_3'] < rows[1]['entropy_3']
    assert 'curves' in said


def test_running_text_is_cut_anywhere_and_lines_never(folders, here):
    words = load_pretrained(Source(str(folders['bert'])), CPU).vocabulary
    text = read_text('words.txt', words, 20, 5)
    assert len(text.ids) == 6 * 12 and text.stride == 1 and text.windows == 72 - 4
    assert text.spread(2).tolist() == [text.ids[:5].tolist(), text.ids[-5:].tolist()]
    proteins = load_pretrained(Source(str(folders['esm'])), CPU).vocabulary
    lines = read_text('proteins.txt', proteins, 38, None)
    assert (lines.length, lines.stride, lines.windows) == (3, 3, 4)
    assert [proteins.decode(row) for row in lines.spread(4)] == ['MKT', 'AKQ', 'RQI', 'LAG']
    first, last = lines.parted(0.3)
    assert proteins.decode(first.ids) == 'MKTAKQRQI' and proteins.decode(last.ids) == 'LAG'
    corpus = text_corpus('proteins.txt', lines.spread(4), proteins)
    assert corpus.characters['val'] == corpus.sizes['val'] == 12 and corpus.name == 'proteins.txt'


@pytest.mark.parametrize('kind, arguments, words', [
    ('bert', ['--text_file=none.txt'], 'none.txt.* is not there'),
    ('bert', ['--text_file=words.txt', '--window_length=23'], 'window_length is 23, but the model reads at most 22'),
    ('bert', ['--text_file=words.txt', '--windows=100', '--window_length=20'], 'the text has 53'),
    ('bert', [], 'model is given, but no text; add --text_file=FILE'),
    ('bert', ['--text_file=words.txt', '--dataset=tiny'], 'model and dataset were both given'),
    ('esm', ['--text_file=words.txt'], 'kinds? of character that the model does not know'),
    ('esm', ['--text_file=proteins.txt', '--window_length=9'], 'no line of 9 characters')])
def test_what_does_not_go_together(folders, here, kind, arguments, words):
    with pytest.raises(UserError, match=words):
        evaluate(f'--model={folders[kind]}', '--measure=nelbo', *arguments)


def test_a_text_without_a_model_is_refused(here):
    with pytest.raises(UserError, match='text_file was given, but applies only with model'):
        evaluate('--text_file=words.txt')
