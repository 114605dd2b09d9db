"""One line under the texts where they are less or more varied than their corpus."""

import pytest
import torch

from core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from core.data.text_figures import Spread, TextFigures
from core.sampling import run
from core.sampling.generation import Generation
from helpers.sampling import VOCABULARY, sample, write_checkpoint

FIGURES = TextFigures(16, Spread(2.0, 0.1), Spread(0.1, 0.1))  # windows of the length of a text
REPEATING, USUAL, WILD = 'ab' * 8, 'abababcd' + 'abcdefgh', 'abcdefghagecbdfh'


@pytest.fixture
def said(tmp_path, monkeypatch):
    """What sample.py says of texts that were written by hand, its checkpoint knowing `figures`."""
    def said(texts, *arguments, figures=FIGURES, **model):
        write_checkpoint(tmp_path / 'ckpt_best.pt', **model)
        checkpoint = load_checkpoint(tmp_path / 'ckpt_best.pt')
        checkpoint.extra = {} if figures is None else {'text_figures': figures.to_builtins()}
        save_checkpoint(tmp_path / 'ckpt_best.pt', checkpoint.to_payload())
        tokens = torch.tensor([VOCABULARY.encode(text) for text in texts])
        monkeypatch.setattr(run, 'generate', lambda *given: Generation(tokens, torch.zeros(tokens.shape), 0))
        lines = sample(tmp_path, f'--num_samples={len(texts)}', '--quality_metric=none', *arguments)[1].split('\n')
        return [line for line in lines if line.startswith('the texts ')]

    return said


def test_texts_that_repeat_themselves_are_told_with_what_to_try(said):
    line, = said([REPEATING] * 4)
    assert line.startswith('the texts repeat themselves: 85% of their 4-grams repeat earlier ones (corpus: 10%)')
    assert line.endswith('try a --temperature above 0.8 or --preset=varied')
    assert said([REPEATING] * 4, '--preset=varied')[0].endswith('try a --temperature above 1')
    assert said([REPEATING] * 4, '--sampling_method=standard')[0].endswith('try a --temperature above 0.8')


def test_a_block_model_is_told_of_no_preset(said):
    line, = said([REPEATING] * 4, kind='block', attention_type='block', block_length=(4,))
    assert line.endswith(('above 0.8', 'above 1'))


def test_wild_texts_are_told_and_usual_ones_are_not(said):
    line, = said([WILD] * 4)
    assert line.startswith('the texts are wilder than the corpus') and line.endswith(
        'try a --temperature below 0.8 or --preset=careful')
    assert said([USUAL] * 4) == []


def test_few_texts_must_be_further_from_the_corpus(said):
    near = TextFigures(16, Spread(2.0, 0.1), Spread(0.45, 0.2))  # the texts' 0.85 is two deviations away
    assert said([REPEATING] * 4, figures=TextFigures(16, Spread(0.7, 0.1), near.repetition))
    assert not said([REPEATING], figures=TextFigures(16, Spread(0.7, 0.1), near.repetition))


def test_nothing_is_told_where_nothing_is_known(said):
    assert said([REPEATING] * 4, figures=None) == []
    assert said([REPEATING[:8]] * 4, '--sequence_length=8') == []  # no whole window
