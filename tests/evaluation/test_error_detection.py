"""The measure `errors`: what counts as an error, every detector against a formula, areas against counted pairs."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from configurator import configure
from core.common.drawing import allowed_ids
from core.common.errors import UserError
from core.common.randomness import Purpose, keyed
from core.data.corpus import load_corpus
from core.data.vocabulary import Vocabulary
from core.data.writing import write_corpus
from core.evaluation import error_detection
from core.evaluation.error_detection import (SHARES, ErrorStudy, auroc_statistic, calibrated, detectors, error_cells,
                                             expected_auroc, measured, one_shot)
from core.evaluation.options import EvaluateConfig
from core.evaluation.run import load_evaluation, run_evaluation
from core.sampling.calibration import find_calibration
from core.validation import auroc
from helpers.toys import V0, awake, model_over, model_that_knows, save_model, toy_config
from model import GPT

ALLOWED = allowed_ids(V0 + 4, V0)
VOCABULARY = Vocabulary(kind='characters', tokens=tuple('\n abcdefgh'))
FOREIGN = 'efgh'  # letters that the held-out text lacks


def random_scores(windows=30, length=12, steps=None):
    """(scores, wrong, filled) [W, T]; with `steps` many of the scores are equal."""
    generator = keyed(3, 0, 0, windows)
    scores = generator.uniform(Purpose.ORDER, length)
    if steps:
        scores = (scores * steps).floor() / steps
    wrong = generator.uniform(Purpose.MASK, length) < 0.2 + 0.6 * scores
    return scores, wrong, generator.uniform(Purpose.TIME, length) < 0.7


# What counts as an error --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('share', [0.1, 0.5, 0.9])
def test_a_share_of_the_positions_is_filled_and_wrong_where_it_differs(share):
    model = awake(GPT(toy_config(block_size=20, add_sampler_head=True), seed=2)).eval()
    truth = torch.randint(0, V0, (40, 20), generator=torch.Generator().manual_seed(1))
    found = one_shot(model, truth, share, ALLOWED, keyed(1, 0, 0, 40), use_sampler_head=True)
    assert (found.filled.sum(1) == round(share * 20)).all()
    assert torch.equal(found.tokens[~found.filled], truth[~found.filled]) and (found.tokens < V0).all()
    assert torch.equal(found.wrong, found.tokens != truth) and 0.3 < found.wrong[found.filled].double().mean() < 0.95
    part = one_shot(model, truth[8:], share, ALLOWED, keyed(1, 0, 8, 32), use_sampler_head=True)
    assert torch.equal(part.tokens, found.tokens[8:])  # whatever the batch


def test_beliefs_are_the_probabilities_that_they_are_named_after():
    model = awake(GPT(toy_config(add_sampler_head=True), seed=2)).eval()
    truth = torch.randint(0, V0, (6, 4), generator=torch.Generator().manual_seed(1))
    found = one_shot(model, truth, 0.5, ALLOWED, keyed(1, 0, 0, 6), use_sampler_head=True)
    alone = one_shot(model, truth, 0.5, ALLOWED, keyed(1, 0, 0, 6), use_sampler_head=False)
    assert torch.equal(alone.self_confidence, alone.marginal)
    assert (found.self_confidence - found.marginal)[found.filled].abs().max() > 1e-3
    pseudo = detectors(model, ALLOWED, sampler_head=True, critic=False, remasking_model=None)['pseudo_likelihood'](
        found, keyed(1, 0, 0, 6))
    for row, place in found.filled.nonzero().tolist():
        token = found.tokens[row, place]
        for beliefs, hidden in ((found.marginal, found.filled[row]), (pseudo, torch.arange(4) == place)):
            shown = found.tokens[row].masked_fill(hidden, V0)
            with torch.no_grad():
                logits = model(shown[None]).logits[0, place, :V0].double()
            assert beliefs[row, place].item() == pytest.approx(1 - logits.softmax(0)[token].item(), abs=1e-6)


# Areas --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('steps', [None, 4])
def test_the_area_of_any_resample_is_that_of_its_windows(steps):
    scores, wrong, filled = random_scores(steps=steps)
    statistic = auroc_statistic(scores, wrong, filled)
    weights = np.stack([np.ones(30), np.arange(30) % 2, np.arange(30) < 7]).astype(np.int64)
    expected = []
    for weight in torch.from_numpy(weights).bool():
        held = filled & weight[:, None]
        expected.append(auroc(scores[held], wrong[held]))
    assert statistic(weights).tolist() == pytest.approx(expected, abs=1e-12)
    doubled = torch.arange(30).repeat_interleave(2)
    assert statistic(np.full((1, 30), 2))[0] == pytest.approx(
        auroc(scores[doubled][filled[doubled]], wrong[doubled][filled[doubled]]), abs=1e-12)


def test_knowing_the_truth_gives_one_its_opposite_zero_and_chance_one_half():
    _, wrong, filled = random_scores(200)
    knows = measured(wrong.double(), wrong, filled, True)
    assert (knows['auroc'], knows['brier'], knows['calibration_error']) == (1.0, 0.0, 0.0)
    assert measured(1 - wrong.double(), wrong, filled, True)['auroc'] == 0.0
    chance = measured(keyed(1, 0, 0, 200).uniform(Purpose.REMASK, 12), wrong, filled, False)
    low, high = chance['auroc_interval']
    error = math.sqrt((filled.sum().item() + 1) / 12 / ((filled & wrong).sum() * (filled & ~wrong).sum()).item())
    assert abs(chance['auroc'] - 0.5) < 3 * error and 2 * error < high - low < 6 * error and 'brier' not in chance
    assert measured(wrong.double(), torch.zeros_like(wrong), filled, True)['auroc'] is None


def test_the_expected_area_is_the_mean_over_the_errors_that_may_happen():
    probability = torch.tensor([0.1, 0.4, 0.4, 0.9], dtype=torch.float64)
    pairs = list(itertools.product(range(4), repeat=2))
    wins = sum(probability[i] * (1 - probability[j]) * (0.5 if probability[i] == probability[j] else
                                                       float(probability[i] > probability[j])) for i, j in pairs)
    all_pairs = sum(probability[i] * (1 - probability[j]) for i, j in pairs)
    assert expected_auroc(probability) == pytest.approx((wins / all_pairs).item(), abs=1e-12)
    assert expected_auroc(torch.ones(3, dtype=torch.float64)) is None


def test_a_generator_that_knows_the_distribution_reaches_its_expected_area_and_nothing_exceeds_it():
    """Truth and fill are drawn from known chances: 1 - p(fill) is calibrated, and noise on it only loses."""
    generator = keyed(5, 0, 0, 400)
    chances = torch.softmax(torch.logit(generator.uniform(Purpose.ORDER, 30 * 4)).view(400, 30, 4) * 2, -1)
    truth, fill = ((generator.uniform(Purpose.TOKEN, 30, stream)[..., None] > chances.cumsum(-1)).sum(-1).clamp(max=3)
                   for stream in (0, 1))
    everywhere = torch.ones(400, 30, dtype=torch.bool)
    belief = 1 - chances.gather(2, fill[..., None]).squeeze(2)
    found = measured(belief, truth != fill, everywhere, True)
    low, high = found['auroc_interval']
    assert abs(found['auroc'] - found['expected_auroc']) < high - low < 0.05 and found['calibration_error'] < 0.02
    noisy = measured(belief + 0.3 * generator.uniform(Purpose.TIME, 30), truth != fill, everywhere, False)
    assert 0.6 < noisy['auroc'] < found['auroc'] - 0.01


def test_a_calibration_is_fitted_on_one_half_of_the_windows_and_judged_on_the_other():
    generator = keyed(2, 0, 0, 200)
    scores = generator.uniform(Purpose.ORDER, 100)
    rate = torch.where(torch.arange(200)[:, None] % 2 == 0, scores, scores.square())  # the halves err differently
    wrong, filled = generator.uniform(Purpose.MASK, 100) < rate, torch.ones(200, 100, dtype=torch.bool)
    found = calibrated(scores, wrong, filled)
    assert found['map']['observed'] == pytest.approx(found['map']['predicted'], abs=0.05)
    assert found['error_rate'] == pytest.approx(1 / 3, abs=0.02)
    assert found['calibration_error'] == pytest.approx(1 / 6, abs=0.02)
    assert found['calibrated_error'] == pytest.approx(1 / 6, abs=0.02)


# The measure, end to end --------------------------------------------------------------------------------------------

@pytest.fixture
def run(data_here):
    """A corpus whose held-out text lacks FOREIGN, and a generator that writes every letter equally often."""
    letters = np.random.default_rng(1)
    texts = {'train': ''.join(letters.choice(VOCABULARY.tokens, 3000)), 'val': ''.join(letters.choice([*'abcd'], 3000))}
    write_corpus(data_here / 'letters', VOCABULARY, texts, 'made up')
    model = model_that_knows(VOCABULARY, FOREIGN, add_critic_head=True)
    with torch.no_grad():
        model.transformer['wte'].weight[VOCABULARY.wrong_token_id] = 0
        model.critic_head.weight.zero_()
        model.critic_head.weight[0, VOCABULARY.encode(FOREIGN + ' \n')] = 1.0
        model.critic_head.bias.fill_(-2.0)
    save_model(Path('out/ckpt_best.pt'), VOCABULARY, model, config={'dataset': 'letters'})
    save_model(Path('out/remasking.pt'), VOCABULARY,
               model_that_knows(VOCABULARY, FOREIGN + ' \n', mode='token_classifier'), 'classifier')
    save_model(Path('out/blank.pt'), VOCABULARY, model_over(VOCABULARY), 'remasking')
    save_model(Path('out/head.pt'), VOCABULARY, model_over(VOCABULARY, add_sampler_head=True),
               config={'dataset': 'letters'})
    save_model(Path('out/causal.pt'), VOCABULARY, model_over(VOCABULARY, attention_type='causal'), 'causal',
               config={'dataset': 'letters'})
    save_model(Path('out/young.pt'), VOCABULARY, model_over(VOCABULARY, add_critic_head=True,
                                                            start_critic_iteration=500),
               config={'dataset': 'letters'})
    return load_corpus('letters')


def evaluate(*arguments):
    configuration = configure(EvaluateConfig, ['--device=cpu', '--measure=errors', '--windows=32', *arguments])
    lines = []
    found = run_evaluation(configuration.config, configuration.explicit, lines.append)
    return found.get('errors'), '\n'.join(lines)


def test_letters_that_the_text_never_has_are_found(run):
    """Six of ten letters are always wrong and known to be, the others are right once in four: AUROC 6/9 + 3/9/2."""
    rows, said = evaluate('--remasking_checkpoint_name=remasking.pt')
    assert [row['mask_share'] for row in rows[:45:5]] == [*SHARES]
    for name in ('critic', 'remasking'):
        for row in (row for row in rows if row['detector'] == name and row.get('mask_share', 0) >= 0.3):
            assert row['error_rate'] == pytest.approx(0.9, abs=0.08) and row['auroc'] == pytest.approx(0.833, abs=0.05)
            assert row['auroc_interval'][0] < row['auroc'] < row['auroc_interval'][1]
            assert sum(row['reliability']['count']) == 32 * round(16 * row['mask_share'])
    assert {row['auroc'] for row in rows if row['detector'] == 'self_confidence'} == {0.5}  # every letter is as likely
    shown = said.splitlines()[said.splitlines().index('errors:') + 1:]
    assert len(shown[0].split()) == 8 and shown[5].split()[0] == '0.5000'
    assert Path('out/errors.png').read_bytes().startswith(b'\x89PNG')
    kept = json.loads(Path('out/calibration.json').read_text())
    assert (kept['dataset'], kept['split'], kept['windows'], kept['detector']) == ('letters', 'val', 32, 'critic')
    assert kept['map']['observed'] == pytest.approx([0.75, 1.0], abs=0.05)
    curve, line = find_calibration(Path('out/ckpt_best.pt'))
    assert curve.observed.tolist() == kept['map']['observed'] and 'error rates' in line


def test_a_rerun_computes_only_what_is_new(run, monkeypatch):
    monkeypatch.setattr(error_detection, 'SHARES', (0.5, 0.8))
    monkeypatch.setattr(error_detection, 'plot_errors', lambda *_: None)  # takes a second
    first, said = evaluate()
    assert 'errors: 9 of 9 done' in said and not any(row['detector'] == 'remasking' for row in first)
    Path('out/calibration.json').unlink()
    again, said = evaluate('--batch_size=7')
    assert again == first and '9 of 9 results are known already' in said and Path('out/calibration.json').exists()
    for name in ('out/remasking.pt', 'blank.pt'):  # in out_dir or as a path; another model's scores are others
        more, said = evaluate(f'--remasking_checkpoint_name={name}')
        assert '9 of 11 results are known already' in said and 'errors: 2 of 2 done' in said
    assert [row for row in more if row['detector'] != 'remasking'] == first


def test_corrections_are_counted_at_wrong_positions_over_the_base_vocabulary(run):
    config = configure(EvaluateConfig, ['--device=cpu', '--windows=32', '--batch_size=7',
                                        '--remasking_checkpoint_name=blank.pt']).config
    study = ErrorStudy(load_evaluation(config, {}, print))
    texts, right, wrong = study.filled(0.5), 0, 0
    for tokens, truth, bad in zip(texts.tokens, study._truth, texts.wrong):
        guesses = study.remasking_model(tokens[None]).logits[0, :, :VOCABULARY.base_size].argmax(-1)
        for place in bad.nonzero().flatten().tolist():
            right, wrong = right + int(guesses[place] == truth[place]), wrong + 1
    assert 0 < right < wrong and study.cell('remasking', 0.5).compute()['correction_accuracy'] == right / wrong
    assert 'correction_accuracy' not in study.cell('critic', 0.5).compute()
    study = ErrorStudy(load_evaluation(dataclasses.replace(config, remasking_checkpoint_name='remasking.pt'), {},
                                       print))
    assert study.cell('remasking', 0.5).compute()['correction_accuracy'] is None  # binary


@pytest.mark.parametrize('arguments, names, calibrations', [
    ([], 'random self_confidence pseudo_likelihood critic', 1),
    (['--split=train'], 'random self_confidence pseudo_likelihood critic', 0),  # its own text calibrates nothing
    (['--checkpoint_name=head.pt'], 'random self_confidence marginal pseudo_likelihood', 0),
    (['--checkpoint_name=young.pt'], 'random self_confidence pseudo_likelihood', 0)])
def test_detectors_are_those_that_there_are(run, arguments, names, calibrations):
    config, lines = configure(EvaluateConfig, ['--device=cpu', *arguments]).config, []
    settings = [cell.settings for cell in error_cells(load_evaluation(config, {}, lines.append))]
    assert [(one['mask_share'], one['detector']) for one in settings if 'mask_share' in one] == [
        (share, name) for share in SHARES for name in names.split()]
    assert sum('mask_shares' in one for one in settings) == calibrations and settings[0]['windows'] == 256
    assert ('the critic head is ignored' in '\n'.join(lines)) == ('--checkpoint_name=young.pt' in arguments)


def test_the_figures_do_not_depend_on_the_batch_size(run):
    found = []
    for size in (64, 7):
        config = configure(EvaluateConfig, ['--device=cpu', '--windows=16', f'--batch_size={size}']).config
        found.append([cell.compute() for cell in error_cells(load_evaluation(config, {}, print))[:4]])
    for whole, part in zip(*found):
        assert {**whole, 'seconds': 0} == {**part, 'seconds': 0}


def test_what_does_not_fit_is_said_in_a_sentence(run):
    for arguments, words in ((['--checkpoint_name=causal.pt'], 'only a diffusion checkpoint fills masks'),
                             (['--windows=15'], 'windows is 15, but an interval needs at least 16'),
                             (['--remasking_checkpoint_name=head.pt'], 'tells no wrong tokens'),
                             (['--measure=nelbo', '--remasking_checkpoint_name=remasking.pt'], 'does not apply')):
        with pytest.raises(UserError, match=words):
            evaluate(*arguments)
    _, said = evaluate('--measure=all', '--checkpoint_name=causal.pt')
    assert 'errors is left out: only a diffusion checkpoint' in said
