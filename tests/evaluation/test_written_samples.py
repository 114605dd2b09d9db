"""Settings, budgets, controls and the comparison at equal entropy, on a toy model; the pages that are made of them."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from configurator import configure
from core.checkpoints.checkpoint import load_checkpoint
from core.common.drawing import DrawRule, allowed_ids
from core.common.errors import UserError
from core.common.randomness import keyed
from core.common.runtime import Runtime
from core.common.timing import TimingAccumulator
from core.data.corpus import load_corpus
from core.data.learning import character_vocabulary
from core.data.writing import write_corpus
from core.evaluation.options import EvaluateConfig
from core.evaluation.quality_tables import (REAL, at_equal_entropy, curves_text, markers, one_line, policies_text,
                                            tell_curves)
from core.evaluation.run import run_evaluation
from core.evaluation.written_samples import (DIALS, Budget, Writer, at_entropy, budgets_of, held_out_texts, load_causal,
                                             nearest_setting, shuffled_characters, shuffled_words, write)
from core.options import TrainConfig
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.policies import POLICIES
from core.sampling.policy_options import make_policy
from core.sampling.prompt import lay_out_prompt
from core.trainer import Run
from helpers.toys import model_over, model_that_knows, save_model

ROOT = Path(__file__).parent.parent.parent
VOCABULARY = character_vocabulary('abcdef \n')
RUNTIME = Runtime(torch.device('cpu'), torch.float32, False)
T = 16
MODEL = model_over(VOCABULARY, add_sampler_head=True, add_critic_head=True).requires_grad_(False)


def writer(**changes):
    values = {'model': MODEL, 'vocabulary': VOCABULARY, 'runtime': RUNTIME,
              'allowed': allowed_ids(VOCABULARY.size, VOCABULARY.base_size), 'sampler_head': False, 'critic': True,
              'samples': 5, 'length': T, 'batch_size': 2, 'seed': 3, **changes}
    return Writer(**values)


# Writing ------------------------------------------------------------------------------------------------------------

def test_texts_are_those_of_the_loop_whatever_the_batches():
    made, whole = write(writer(), make_policy('llada', iterations=4), 0.9), writer(batch_size=5)
    network, generator = Network(whole.model, TimingAccumulator()), keyed(3, 0, 0, 5)
    settings = GenerationSettings('diffusion', DrawRule(whole.allowed, 0.9), make_policy('llada', iterations=4))
    tokens = generate(network, lay_out_prompt([], T, VOCABULARY.mask_token_id, generator), settings, generator).tokens
    assert made.texts == [VOCABULARY.decode(row) for row in tokens.tolist()]
    assert made.trunk_calls == network.trunk_calls == 4 and made.self_confidence < 0 < made.seconds
    remasking = write(writer(), make_policy('remask', iterations=4), 0.9)
    assert (remasking.trunk_calls, remasking.network_calls) == (4, 7)  # a critic call between every two predictions


def test_head_temperature_and_seed_change_the_texts():
    policy = make_policy('random', iterations=2)
    texts = [write(writer(**changes), policy, temperature).texts for changes, temperature in (
        ({}, 1.0), ({'sampler_head': True}, 1.0), ({}, 0.5), ({'seed': 4}, 1.0))]
    assert len({tuple(one) for one in texts}) == 4


def test_calls_are_counted_by_a_hook_too():
    counted = writer(samples=4)
    seen = []
    hook = counted.model.transformer.wte.register_forward_hook(lambda *_: seen.append(1))
    made = write(counted, make_policy('mdlm', iterations=6), 1.0)
    hook.remove()
    scoring = 2 * 8  # self-confidence, 8 groups for each of two batches
    assert len(seen) == 2 * made.network_calls + scoring


def test_a_causal_model_writes_left_to_right():
    causal = model_over(VOCABULARY, attention_type='causal').requires_grad_(False)
    made = write(writer(model=causal, critic=False), None, 1.0)
    assert made.trunk_calls == T and all(len(text) == T for text in made.texts)


# Budgets ------------------------------------------------------------------------------------------------------------

def test_a_search_comes_as_near_as_any_trial():
    def calls(x):
        return max(1, round(128 * x ** 3))

    known, tried = {}, []
    for wanted in (8, 16, 32, 64, 1, 128):
        x = nearest_setting(lambda x: tried.append(x) or calls(x), wanted, 128, known)
        assert abs(known[x] - wanted) <= wanted // 16 and known[x] == calls(x)
    assert set(known) == set(tried) and len(tried) < 30
    assert known[nearest_setting(lambda x: pytest.fail('tried again'), 16, 128, known)] in (15, 16, 17)
    step = {}
    assert nearest_setting(lambda x: 3 if x < 0.7 else 90, 16, 128, step) < 0.7 and set(step.values()) == {3, 90}
    assert abs(min(step, key=lambda x: abs(x - 0.7)) - 0.7) < 0.1


@pytest.mark.parametrize('name', DIALS)
def test_a_dial_turns_more_calls(name):
    option, value = DIALS[name]
    calls = [write(writer(samples=2), make_policy(name, **{option: value(x)}), 1.0).trunk_calls for x in (0, 0.5, 1)]
    assert calls == sorted(calls) and calls[0] < calls[2] == T
    budget = Budget(writer(samples=2))
    found = budget.write(name, 8, 1.0)
    assert set(found.options) == {option} and abs(found.written.trunk_calls - 8) <= 3


def test_budgets_of_policies():
    assert budgets_of('random', [2, 4]) == [2, 4] == budgets_of('entropy_bounded', [2, 4])
    assert budgets_of('first_hitting', [2, 4]) == [None] == budgets_of('dilated', [2, 4])
    budget = Budget(writer(samples=2))
    assert budget.write('random', 4, 1.0).written.trunk_calls == 4
    assert budget.write('first_hitting', None, 1.0).written.trunk_calls == T
    assert budget.write('dilated', None, 1.0).written.trunk_calls == 4
    assert {name for name, row in POLICIES.items() if row.calls == 'at most n'} == set(DIALS)


# Controls -----------------------------------------------------------------------------------------------------------

def test_shuffled_texts_keep_their_parts():
    texts = ['to be  or\nnot to be', ' the king ', 'abcabc']
    for one, words, characters in zip(texts, shuffled_words(texts, 1), shuffled_characters(texts, 1)):
        assert Counter(characters) == Counter(one) == Counter(words)
        assert Counter(words.split()) == Counter(one.split())
        assert [c if c.isspace() else '' for c in words if c.isspace()] == [c for c in one if c.isspace()]
    assert shuffled_words(texts, 1) == shuffled_words(texts, 1) != shuffled_words(texts, 2)
    assert shuffled_characters(texts, 1)[0] != texts[0] != shuffled_words(texts, 1)[0]


def test_held_out_texts_are_windows_of_the_split(small_corpus):
    whole = small_corpus.vocabulary.decode(small_corpus.tokens('val').tolist())
    texts = held_out_texts(small_corpus, 'val', 5, 40)
    assert texts[0] == whole[:40] and texts[-1] == whole[-40:] and all(text in whole for text in texts)


# Equal entropy ------------------------------------------------------------------------------------------------------

def test_figures_at_equal_entropy_lie_on_the_line_between_neighbours():
    points = [(7.0, 3.0), (5.0, 1.0), (6.0, 1.5)]
    assert at_entropy(points, 5.5) == pytest.approx(1.25) and at_entropy(points, 6.5) == pytest.approx(2.25)
    assert at_entropy(points, 7.0) == 3.0 and at_entropy(points, 5.0) == 1.0
    assert at_entropy(points, 7.01) is None and at_entropy(points, 4.9) is None and at_entropy([], 1.0) is None


def rows_of(entropies=(5.0, 6.0, 7.0), target=6.5):
    common = {'samples': 8, 'length': 16, 'batch_size': 8, 'seed': 1, 'sampler_head': True, 'critic': False,
              'dtype': 'float32', 'split': 'val', 'dataset': 'tiny'}
    rows = [{**common, 'control': REAL, 'entropy_3': target, 'reference_bits': 2.0,
             'reference_bits_interval': [1.9, 2.1]}]
    for name, extra in (('llada', 0.0), ('mdlm', 1.0), ('entropy_bounded', 0.5), ('p2_self', 0.25)):
        rows += [{**common, 'policy': name, 'wanted_calls': calls, 'temperature': place / 10, 'options': {},
                  'trunk_calls': float(calls), 'network_calls': calls * 2.0, 'seconds': calls / 10 + place,
                  'entropy_3': one, 'reference_bits': one / 2 + extra - calls / 100,
                  'reference_bits_interval': [one / 2 + extra - 0.2, one / 2 + extra + 0.2], 'known_words': 0.5,
                  'copied_span': 9.0, 'repetition': None} for calls in (8, 16) for place, one in enumerate(entropies)]
    return rows


def test_policies_are_compared_at_the_entropy_of_real_text():
    found = {(equal.policy, equal.wanted): equal for equal in at_equal_entropy(rows_of())}
    figures = found['mdlm', 16].figures
    assert figures['reference_bits'] == pytest.approx(6.5 / 2 + 1 - 0.16) and figures['seconds'] == pytest.approx(3.1)
    assert (figures['low'], figures['high']) == (pytest.approx(4.05), pytest.approx(4.45))
    assert figures['temperature'] == pytest.approx(0.15) and figures['repetition'] is None
    assert found['llada', 8].figures['reference_bits'] < found['mdlm', 8].figures['reference_bits']
    text = curves_text(rows_of(), 'python evaluate.py --measure=curves')
    assert '3.170 (3.050 - 3.450)' in text and '6.500 nats' in text and '5.00 to 7.00' in text
    (unreached,) = {equal.figures['reference_bits'] for equal in at_equal_entropy(rows_of(target=9.0))}
    assert unreached is None


def test_the_pictures_are_drawn(tmp_path):
    said = []
    evaluation = SimpleNamespace(out_dir=tmp_path, explicit={'seed': ''}, config=SimpleNamespace(seed=4),
                                 say=said.append)
    tell_curves(evaluation, rows_of())
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert '--measure=curves --seed=4' in (tmp_path / 'curves.md').read_text() and 'curves.png' in said[1]


def test_a_sample_stays_one_cell_of_a_table():
    assert one_line('a|b\nc`d', 6) == "`a\\|b\u00b6c'`"


# Through evaluate.py ------------------------------------------------------------------------------------------------

QUICK = {'device': 'cpu', 'num_samples': 8, 'batch_size': 8}


@pytest.fixture
def runs(small_corpus):
    """A generator in out/ with both heads and a causal model in out-ar/, of another seed."""
    vocabulary = small_corpus.vocabulary
    save_model(Path('out/ckpt_best.pt'), vocabulary, model_over(
        vocabulary, block_size=32, add_sampler_head=True, add_critic_head=True), config={'dataset': 'tiny', 'seed': 1})
    save_model(Path('out-ar/ckpt_best.pt'), vocabulary, model_over(
        vocabulary, block_size=32, attention_type='causal'), 'causal', config={'dataset': 'tiny', 'seed': 5})
    return small_corpus


def evaluate(said=None, **changes):
    config = EvaluateConfig(**{**QUICK, **changes})
    return run_evaluation(config, changes, (said if said is not None else []).append)


def test_policies_from_checkpoint_to_page_and_again(runs, monkeypatch):
    page, said = Path('page.md'), []
    page.write_text('by hand\n{}\n{}\nby hand too\n'.format(*markers('policies')))
    chosen = {'measure': 'policies', 'policies': 'random,fast_dllm_factor,dilated', 'trunk_calls': [2.0, 4.0]}
    rows = evaluate(said, **chosen, report='page.md')['policies']
    assert [row.get('policy') for row in rows if 'policy' in row] == \
        ['random'] * 2 + ['fast_dllm_factor'] * 2 + ['dilated']
    assert [row['trunk_calls'] for row in rows if row.get('policy') in ('random', 'dilated')] == [2, 4, 5]
    assert [row['control'] for row in rows if 'control' in row] == \
        [REAL, 'shuffled words', 'shuffled characters', 'greedy (llada)', 'causal model']
    record = json.loads(Path('policies.json').read_text())
    text = page.read_text()
    assert policies_text(record) in text and text.startswith('by hand\n') and text.endswith('by hand too\n')
    assert '### 2 trunk calls' in text and 'parallel_factor' in text and 'reference_bits' not in record['rows'][0]
    assert any('out-reference' in line and 'config/train_char_reference.py' in line for line in said)
    monkeypatch.setattr('core.evaluation.written_samples.generate', lambda *_: pytest.fail('written again'))
    assert evaluate(**chosen)['policies'] == rows  # from the cache


def test_quality_with_a_reference_model(runs):
    said = []
    rows = evaluate(said, measure='quality', trunk_calls=[2.0], reference_checkpoint='out-ar/ckpt_best.pt')['quality']
    assert all(0 < row['reference_bits_interval'][0] <= row['reference_bits'] + 1e-12 for row in rows)
    assert any('warning' in line and 'same split (train)' in line for line in said)
    assert Path('out/quality.png').stat().st_size > 10000
    assert 'reference bits' in Path('out/quality.md').read_text()


def test_who_guides_the_remasking_is_compared(runs):
    """A critic is a network call more between two predictions; a remasking model's letter is taken back again."""
    vocabulary = runs.vocabulary
    letter = vocabulary.decode([1])
    save_model(Path('out/remasking.pt'), vocabulary, model_that_knows(vocabulary, letter, block_size=32), 'remasking')
    rows = evaluate(measure='quality', policies='remask,random', guidance='critic,model,self,random',
                    trunk_calls=[6.0], temperature=2.0, remasking_checkpoint_name='remasking.pt')['quality']
    found = {row.get('guidance'): row for row in rows if row.get('policy') == 'remask'}
    assert {name: row['network_calls'] for name, row in found.items()} == {
        'critic': 11, 'model': 11, 'self': 6, 'random': 6}
    assert len({row['self_confidence'] for row in found.values()}) == 4
    assert [row['guidance'] for row in rows if row.get('policy') == 'random' and 'guidance' in row] == []
    table = Path('out/quality.md').read_text()
    assert 'remask (model)' in table and 'remask (self)' in table
    counts = {name: row['sample'].count(letter) for name, row in found.items()}
    assert counts['model'] <= min(counts.values())


def test_what_is_taken_back_by_chance_can_be_chosen(runs):
    """With all of it by chance, self-confidence guides nothing; each share is a result of its own."""
    chosen = {'measure': 'quality', 'policies': 'remask', 'trunk_calls': [6.0], 'temperature': 2.0}
    by_lot = evaluate(**chosen, guidance='random')['quality'][-1]
    samples = {share: evaluate(**chosen, guidance='self', randomness_strength=share)['quality'][-1]['sample']
               for share in (0.0, 1.0)}
    assert samples[1.0] == by_lot['sample'] != samples[0.0]


def test_the_reference_model_is_trained_on_ref_alone(small_corpus):
    configuration = configure(TrainConfig, [str(ROOT / 'config' / 'train_char_reference.py'), '--device=cpu'])
    config = configuration.config
    config.n_layer, config.n_head, config.n_embd, config.block_size = 1, 2, 16, 8
    splits = {'train': 'to be or not to be. ' * 9, 'ref': 'be or not. ' * 5, 'val': 'not to be. ' * 5}
    write_corpus(Path('data/split'), character_vocabulary(splits['train']), splits, 'made up')
    corpus = load_corpus('split')
    assert config.seed != TrainConfig().seed and config.attention_type == 'causal'
    assert np.array_equal(Run(config, RUNTIME, corpus, print).state.plan.tokens, corpus.tokens('ref'))
    config.train_split = 'train'
    assert np.array_equal(Run(config, RUNTIME, corpus, print).state.plan.tokens, corpus.tokens('train'))
    with pytest.raises(UserError, match='no ref.bin'):
        config.train_split = 'ref'
        Run(config, RUNTIME, small_corpus, print)


@pytest.mark.parametrize('changes, words', [
    ({'measure': 'curves', 'reference_checkpoint': 'nothing.pt'}, ['nothing.pt', 'config/train_char_reference.py']),
    ({'measure': 'curves'}, ['out-reference', 'config/train_char_reference.py']),
    ({'measure': 'curves', 'reference_checkpoint': 'out-ar/ckpt_best.pt', 'temperatures': [1.0]}, ['at least two']),
    ({'measure': 'quality', 'reference_checkpoint': 'out/ckpt_best.pt'}, ["'unmasking'", 'causal']),
    ({'measure': 'quality', 'num_samples': 7}, ['7', 'at least 8']),
    ({'measure': 'policies', 'policies': 'randon'}, ["'randon'", "'random'"]),
    ({'measure': 'policies', 'trunk_calls': [33.0]}, ['33', '32']),
    ({'measure': 'policies', 'trunk_calls': [1.5]}, ['1.5', 'whole']),
    ({'measure': 'quality', 'temperature': -0.5}, ['negative']),
    ({'measure': 'quality', 'sequence_length': 0}, ['sequence_length', '0']),
    ({'measure': 'quality', 'guidance': 'oracle'}, ["'oracle'", 'critic,model,self,random']),
    ({'measure': 'quality', 'guidance': 'model'}, ['remasking_checkpoint_name', 'config/train_char_remasking.py']),
    ({'measure': 'quality', 'guidance': 'self', 'policies': 'llada'}, ['policy remask', 'llada']),
    ({'measure': 'quality', 'randomness_strength': 0.4, 'policies': 'llada'}, ['randomness_strength', 'llada']),
    ({'measure': 'quality', 'randomness_strength': 1.5}, ['randomness_strength', '1.5']),
    ({'measure': 'quality', 'remasking_checkpoint_name': 'x.pt'}, ['does not apply', 'guidance=model']),
    ({'measure': 'quality', 'report': 'page.md'}, ['report', 'measure=policies']),
    ({'measure': 'policies', 'report': 'page.md'}, ['page.md', 'docs/results/policies.md']),
    ({'measure': 'quality', 'out_dir': 'out-ar'}, ["'causal'", 'causal_checkpoint']),
])
def test_wrong_input_is_one_sentence(runs, changes, words):
    with pytest.raises(UserError) as error:
        evaluate(**changes)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not Path('out/evaluation.json').exists()  # said before anything is computed


def test_the_page_of_the_docs_is_what_its_record_says():
    record = ROOT / 'docs' / 'results' / 'policies.json'
    begin, end = markers('policies')
    between = (ROOT / 'docs' / 'results' / 'policies.md').read_text().partition(begin)[2].partition(end)[0]
    assert between.strip('\n') == (policies_text(json.loads(record.read_text())).strip('\n') if record.exists() else '')


def test_causal_checkpoints_only(runs):
    scorer, trained = load_causal(Path('out-ar/ckpt_best.pt'), RUNTIME, 'cure')
    assert trained['seed'] == 5 and scorer.vocabulary.hash == runs.vocabulary.hash
    weights = load_checkpoint('out-ar/ckpt_best.pt').weights()
    assert np.array_equal(scorer.model.transformer.wte.weight, weights['transformer.wte.weight'])
