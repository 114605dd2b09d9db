"""Remasking models and judges as helpers of sampling: what they pick, how they are asked, and what is refused."""

import itertools
import json
import math
import re

import pytest
import torch

from configurator import configure
from core.common.errors import UserError
from core.data.vocabulary import Vocabulary
from core.sampling.options import SampleConfig
from core.sampling.run import run_sampling
from helpers.toys import model_over, model_that_knows, save_model
from model import GPT
from sample_utils import intelligent_remask, judge_scores, wrong_probabilities

VOCABULARY = Vocabulary(kind='characters', tokens=tuple('\n abcdefgh'))
WRONG = 'aceg'
KINDS = {'remasking': {}, 'classifier': {'mode': 'token_classifier'},
         'multiclass': {'mode': 'token_classifier', 'num_token_classes': 4}}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    save_model(folder / 'ckpt_best.pt', VOCABULARY, model_over(VOCABULARY))
    save_model(folder / 'critic.pt', VOCABULARY, model_over(VOCABULARY, add_critic_head=True))
    for kind, changes in KINDS.items():
        save_model(folder / f'{kind}.pt', VOCABULARY, model_that_knows(VOCABULARY, WRONG, **changes), kind)
    save_model(folder / 'short.pt', VOCABULARY, model_over(VOCABULARY, block_size=8), 'remasking')
    save_model(folder / 'judge.pt', VOCABULARY, model_over(VOCABULARY, mode='sequence_scorer', block_size=17), 'judge')
    for name, tokens in (('larger', '\n abcdefghi'), ('other', '\n abcdefgx')):
        other = Vocabulary(kind='characters', tokens=tuple(tokens))
        save_model(folder / f'{name}.pt', other, model_over(other), 'remasking')
    return folder


def sample(folder, *arguments):
    configuration = configure(SampleConfig, [f'--out_dir={folder}', '--device=cpu', *arguments])
    lines = []
    return run_sampling(configuration.config, configuration.explicit, lines.append), '\n'.join(lines)


def remaskings(folder, tmp_path, *arguments):
    """(tokens before, positions taken back) of every remasking of every sample."""
    sample(folder, f'--save_json={tmp_path}/run.json', *arguments)
    steps = json.loads((tmp_path / 'run.json').read_text())['steps']
    return [(before['tokens'], after['changed']) for first, second in itertools.pairwise(steps)
            if second['event'] == 'remask' for before, after in zip(first['samples'], second['samples'])]


@pytest.mark.parametrize('kind', KINDS)
def test_p_wrong_is_the_share_of_the_wrong_id_in_the_softmax_or_of_all_classes_but_the_first(kind):
    model = model_over(VOCABULARY, **KINDS[kind])
    tokens = torch.randint(0, VOCABULARY.base_size, (3, 16), generator=torch.Generator().manual_seed(1))
    found = wrong_probabilities(model, tokens)
    with torch.no_grad():
        for row, place in itertools.product(range(3), range(16)):
            weights = [math.exp(logit) for logit in model(tokens).logits[row, place].tolist()]
            right, wrong = (range(VOCABULARY.base_size), [VOCABULARY.wrong_token_id]) if kind == 'remasking' else \
                ([0], range(1, len(weights)))
            share = sum(weights[i] for i in wrong) / sum(weights[i] for i in [*right, *wrong])
            assert found[row, place].item() == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_a_perfect_model_takes_back_exactly_the_wrong_tokens(kind):
    model = model_that_knows(VOCABULARY, WRONG, **KINDS[kind])
    tokens = torch.tensor([VOCABULARY.encode('ab\ncd efhbdfb'), VOCABULARY.encode('bbabbbbcddeg ')])
    wrong = torch.isin(tokens, torch.tensor(VOCABULARY.encode(WRONG)))
    assert torch.equal(wrong_probabilities(model, tokens) > 0.5, wrong)
    assert torch.equal(intelligent_remask(tokens[:1], model, int(wrong[0].sum())), wrong[:1])
    protected = torch.zeros_like(wrong)
    protected[1, 2] = True
    tokens[1, 7] = VOCABULARY.mask_token_id
    assert intelligent_remask(tokens, model, 2, protected)[1].nonzero().flatten().tolist() == [10, 11]
    assert intelligent_remask(tokens, model, 99, protected)[1].sum() == 11


def test_nearly_certain_models_still_order_the_positions():
    """P(wrong) of a model that calls everything wrong lies so near to 1 that float32 has no number for it."""
    model = model_that_knows(VOCABULARY, '\n abcdefgh')
    with torch.no_grad():
        model.transformer['wte'].weight[VOCABULARY.wrong_token_id] += 3 + torch.arange(16) * 0.05
    found = wrong_probabilities(model, torch.arange(VOCABULARY.base_size)[None])[0]
    assert (found.float() == 1).all() and (found.diff() > 0).all()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('checkpoint', ['ckpt_best.pt', 'critic.pt'])
def test_threshold_mode_takes_back_what_the_external_model_calls_wrong(folder, tmp_path, kind, checkpoint):
    """Before a critic head, in a generator that has one, too."""
    found = remaskings(folder, tmp_path, f'--checkpoint_name={checkpoint}', f'--remasking_checkpoint_name={kind}.pt',
                       '--schedule_mode=threshold', '--start_threshold=0.5', '--end_threshold=0.5', '--iterations=3',
                       '--start_text=ac', '--num_samples=3')
    wrong = VOCABULARY.encode(WRONG)
    assert len(found) == 6
    for tokens, changed in found:
        assert changed == [place for place, token in enumerate(tokens) if token in wrong and place >= 2]


@pytest.mark.parametrize('kind', KINDS)
def test_ratio_mode_takes_back_the_most_wrong_first(folder, tmp_path, kind):
    found = remaskings(folder, tmp_path, f'--remasking_checkpoint_name={kind}.pt', '--randomness_strength=0',
                       '--iterations=4', '--start_ratio=0.75', '--end_ratio=0.25', '--num_samples=3')
    wrong = VOCABULARY.encode(WRONG)
    assert [len(changed) for _, changed in found] == [12] * 3 + [8] * 3 + [4] * 3
    for tokens, changed in found:
        picked = sum(tokens[place] in wrong for place in changed)
        assert picked == min(len(changed), sum(token in wrong for token in tokens))


@pytest.mark.parametrize('policy', ['p2_critic', 'token_critic'])
def test_policies_that_need_a_critic_take_the_external_model(folder, tmp_path, policy):
    """All wrong tokens go before any other (token-critic), or all wrong ones among the old (path planning)."""
    found = remaskings(folder, tmp_path, '--remasking_checkpoint_name=classifier.pt', f'--sampling_policy={policy}',
                       '--iterations=4', '--num_samples=4',
                       *(['--selection_noise=0'] if policy == 'token_critic' else []))
    assert len(found) == 12
    judged = 0
    for (_, before), (tokens, changed) in zip([([], range(16))] * 4 + found, found):
        places = [place for place in range(16) if policy == 'token_critic' or place not in before]
        wrong = [place for place in places if tokens[place] in VOCABULARY.encode(WRONG)]
        judged += len(wrong)
        assert set(wrong) <= set(changed) or set(changed) <= set(wrong)
    assert judged > 5
    with pytest.raises(UserError, match='needs a critic'):
        sample(folder, f'--sampling_policy={policy}')


def test_the_external_model_counts_as_a_network_call_and_not_as_one_of_the_trunk(folder):
    plain, _ = sample(folder, '--iterations=4', '--num_samples=2')
    guided, said = sample(folder, '--iterations=4', '--num_samples=2', '--remasking_checkpoint_name=classifier.pt')
    assert (plain.trunk_calls, plain.network_calls) == (4, 4)
    assert (guided.trunk_calls, guided.network_calls) == (4, 7)
    assert guided.texts != plain.texts and 'remasking model ' in said and '\ncritic ' not in said


def test_a_path_serves_as_well_as_a_name_in_the_run_folder(folder, tmp_path):
    save_model(tmp_path / 'elsewhere.pt', VOCABULARY, model_that_knows(VOCABULARY, WRONG), 'remasking')
    by_name, _ = sample(folder, '--iterations=3', '--remasking_checkpoint_name=remasking.pt')
    by_path, _ = sample(folder, '--iterations=3', f'--remasking_checkpoint_name={tmp_path}/elsewhere.pt')
    assert by_name.texts == by_path.texts


def test_the_judge_reads_cls_and_the_whole_text(folder):
    judge = model_over(VOCABULARY, mode='sequence_scorer', block_size=17)
    result, said = sample(folder, '--quality_metric=judge', '--judge_checkpoint_name=judge.pt', '--iterations=2',
                          '--num_samples=3', '--batch_size=2')
    with torch.no_grad():
        for tokens, score in zip(result.tokens, result.scores):
            text = torch.cat((torch.tensor([VOCABULARY.cls_token_id]), tokens))
            evaluation = judge(text[None]).logits.sigmoid().item()
            assert text.shape == (17,) and score == pytest.approx(1 - evaluation, abs=1e-6)
            changed = text.clone()
            changed[-1] = (changed[-1] + 1) % VOCABULARY.base_size  # the last token has not been cut off
            assert abs(judge_scores(judge, changed[None, 1:]).item() - score) > 1e-6
    mean = sum(result.scores) / 3
    assert f'judge score {mean:.3f} (1 - evaluation; 1 is real text), ' in said
    assert re.search(r'1 is real text\), \d+ tokens/s', said) and re.search(r'\njudge +\d', said)
    assert '--- sample 1 (judge score 0.' in said and 'self-confidence' not in said


def test_a_padded_batch_is_judged_like_its_rows_alone():
    judge: GPT = model_over(VOCABULARY, mode='sequence_scorer', block_size=17)
    rows = [torch.tensor([VOCABULARY.cls_token_id, *VOCABULARY.encode(text)]) for text in ('abc', 'hgfedcba ab', 'e')]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=VOCABULARY.pad_token_id)
    with torch.no_grad():
        together = judge.sequence_scores(padded, padded != VOCABULARY.pad_token_id)
        alone = torch.cat([judge.sequence_scores(row[None]) for row in rows])
        assert torch.allclose(together, alone, atol=1e-6)
        assert not torch.allclose(together[0], judge.sequence_scores(padded)[0], atol=1e-4)


@pytest.mark.parametrize('arguments, words', [
    (['--remasking_checkpoint_name=none.pt'], 'remasking_checkpoint_name is none.pt, but there is neither in'),
    (['--remasking_checkpoint_name=ckpt_best.pt'], "kind 'unmasking', which tells no wrong tokens; give one"),
    (['--remasking_checkpoint_name=judge.pt'], "kind 'judge', which tells no wrong tokens"),
    (['--checkpoint_name=remasking.pt'], "kind 'remasking', which writes no text; give --checkpoint_name=... of a "
     'language model, and this one as --remasking_checkpoint_name=...'),
    (['--checkpoint_name=judge.pt'], 'and this one as --judge_checkpoint_name=...'),
    (['--remasking_checkpoint_name=larger.pt'], 'whose vocabulary has 11 tokens, but the text has 10'),
    (['--remasking_checkpoint_name=other.pt'], 'whose vocabulary has 10 other tokens, but the text has 10'),
    (['--remasking_checkpoint_name=short.pt'], 'block_size of 8, but must read 16 tokens at once'),
    (['--remasking_checkpoint_name=remasking.pt', '--sampling_policy=mdlm'], 'remask, p2_critic, token_critic'),
    (['--remasking_checkpoint_name=remasking.pt', '--sampling_method=multinomial'], 'does not apply to sampling_meth'),
    (['--quality_metric=judge'], 'no judge is named; add --judge_checkpoint_name=...'),
    (['--judge_checkpoint_name=judge.pt'], 'applies only with quality_metric=judge'),
    (['--quality_metric=judge', '--judge_checkpoint_name=classifier.pt'], "kind 'classifier', which judges no text"),
    (['--quality_metric=judge', '--judge_checkpoint_name=judge.pt', '--sequence_length=17'],
     'block_size of 17, but must read 18 tokens at once (the CLS token and 17 of text)'),
])
def test_what_does_not_fit_is_one_sentence(folder, arguments, words):
    with pytest.raises(UserError) as caught:
        sample(folder, '--iterations=2', *arguments) if '--sampling_policy=mdlm' not in arguments else \
            sample(folder, *arguments)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_shorter_text_fits_a_shorter_remasking_model(folder):
    result, _ = sample(folder, '--remasking_checkpoint_name=short.pt', '--sequence_length=8', '--iterations=2')
    assert all(len(text) == 8 for text in result.texts)
