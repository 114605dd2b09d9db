"""What lm-evaluation-harness is told: conditional likelihoods and bounds against enumeration, windows and blocks
against what generation itself says of the texts it draws. Nothing here needs the harness."""

import math
import sys
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch

from configurator import configure
from core.checkpoints.kinds import CheckpointKind
from core.common.drawing import DrawRule, allowed_ids
from core.common.errors import UserError
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.data.learning import character_vocabulary
from core.evaluation.harness.__main__ import main
from core.evaluation.harness.options import HarnessConfig
from core.evaluation.harness.scoring import (Request, Subject, Writing, cut_at, fitted, load_subject, log_likelihoods,
                                             numbered, pair_of, written_texts)
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.path_likelihood import path_of_text
from core.sampling.prompt import Layout
from helpers.policy_laws import ORACLE, T, V, V0, conditionals
from helpers.toys import awake, model_over, save_model, toy_config
from model import GPT

ALLOWED = allowed_ids(V, V0)
MASK = V0
SILENT = [].append


def subject(model=ORACLE, head='none', block_length=None, vocabulary=None, allowed=ALLOWED, **options):
    return Subject(HarnessConfig(device='cpu', **options), model, vocabulary, allowed, head, block_length, [])


def score(requests, **options):
    return log_likelihoods(subject(**options), requests, SILENT)


def exact(tokens, place):
    """Probabilities at `place` given `tokens`, by the oracle's own enumeration."""
    return conditionals(tuple((token, 1.0) for token in tokens))[place]


def make_model(config=None, **changes):
    return awake(GPT(config or toy_config(**changes))).double().eval().requires_grad_(False)


def every_continuation(given):
    return numbered([(given, asked) for asked in product(range(V0), repeat=T - len(given))])


def in_groups(given, asked, groups):
    """log p of `asked` after `given` where each group of places is revealed from one call, and whether every token was
    the most probable one: plain Python."""
    shown, total, greedy = [*given, *[MASK] * len(asked)], 0.0, True
    text = (*given, *asked)
    for group in groups:
        weights = {place: exact(shown, place) for place in group}
        total += sum(math.log(weights[place][text[place]]) for place in group)
        greedy &= all(weights[place][text[place]] == max(weights[place]) for place in group)
        for place in group:
            shown[place] = text[place]
    return total, greedy


@pytest.mark.parametrize('given', [(), (2,), (0, 1), (1, 1, 2)])
@pytest.mark.parametrize('calls', [1, 2, None])
def test_the_likelihood_given_a_context_is_the_enumerated_one(given, calls):
    places = list(range(len(given), T))
    half = -(-len(places) // 2)
    groups = {1: [places], 2: [group for group in (places[:half], places[half:]) if group],
              None: [[place] for place in places]}[calls]
    requests = every_continuation(given)
    found = score(requests, policy='left_to_right', trunk_calls=calls)
    for request, one in zip(requests, found):
        expected, greedy = in_groups(given, request.asked, groups)
        assert one.log_likelihood == pytest.approx(expected, abs=1e-9) and one.greedy == greedy
    assert sum(math.exp(one.log_likelihood) for one in found) == pytest.approx(1, abs=1e-9)
    assert 1 <= sum(one.greedy for one in found) < max(2, len(found))


@pytest.mark.parametrize('head', ['none', 'wave'])
@pytest.mark.parametrize('policy', ['random', 'margin', 'strided'])
def test_continuations_share_a_probability_of_one_under_every_policy_and_head(policy, head):
    requests = [request._replace(number=77) for request in every_continuation((1,))]  # one order for all of them
    found = score(requests, policy=policy, head=head, trunk_calls=2)
    assert sum(math.exp(one.log_likelihood) for one in found) == pytest.approx(1, abs=1e-9)


def test_the_bound_is_the_enumerated_mean_over_masks():
    given, asked, draws = (1,), (2, 0, 1), 3000
    terms = {}  # by the number of masked positions
    for count in (1, 2, 3):
        for places in combinations(range(1, 4), count):
            shown = [MASK if place in places else token for place, token in enumerate((*given, *asked))]
            terms.setdefault(count, []).append(
                3 / count * sum(math.log(exact(shown, place)[(*given, *asked)[place]]) for place in places))
    expected = sum(sum(one) / len(one) for one in terms.values()) / 3
    spread = [sum((term - sum(one) / len(one)) ** 2 for term in one) / len(one) for one in terms.values()]
    error = math.sqrt(sum(spread) / 3 / draws)  # the draws are stratified over the counts
    (found,) = score(numbered([(given, asked)]), policy='left_to_right', measure='nelbo', draws=draws, batch_size=700)
    assert abs(found.log_likelihood - expected) < 4 * error + 1e-9
    assert error < 0.05 * abs(expected)
    assert found.greedy == in_groups(given, asked, [[1], [2], [3]])[1]


@pytest.mark.parametrize('measure', ['likelihood', 'nelbo'])
def test_neither_batch_nor_order_nor_company_change_a_number(measure):
    pairs = [((1,), (2, 0)), ((), (1, 2, 0, 0)), ((2, 2), (1,)), ((1,), (2, 1)), ((), (0, 0, 1, 2)), ((0,), (1, 1))]
    options = {'measure': measure, 'policy': 'random', 'trunk_calls': 2, 'draws': 11, 'model': make_model(block_size=4)}
    together = score(numbered(pairs), batch_size=5, **options)
    one_by_one = score(numbered(pairs), batch_size=1, **options)
    backwards = score(numbered(pairs[::-1]), batch_size=4, **options)[::-1]
    alone = [score(numbered([pair]), batch_size=3, **options)[0] for pair in pairs]
    for other in (one_by_one, backwards, alone):
        assert [one.greedy for one in other] == [one.greedy for one in together]
        assert [one.log_likelihood for one in other] == pytest.approx(
            [one.log_likelihood for one in together], abs=1e-12)


def test_other_seeds_give_other_orders():
    requests = numbered([((), (1, 2, 0, 0)), ((), (2, 2, 0, 1)), ((), (0, 2, 1, 1))])
    found = [[one.log_likelihood for one in score(requests, trunk_calls=2, seed=seed)] for seed in (1, 2)]
    assert found[0] != found[1]


def test_equal_requests_have_numbers_of_their_own():
    first, second, other = numbered([((1,), (2,)), ((1,), (2,)), ((1,), (0,))])
    assert first[:2] == second[:2] and len({first.number, second.number, other.number}) == 3
    assert all(0 <= request.number < 2 ** 32 for request in (first, second, other))
    assert numbered([((1,), (2,))]) == [first]


# Long texts -----------------------------------------------------------------------------------------------------------

def test_a_long_context_loses_its_first_tokens_and_that_is_told():
    said = []
    requests = [Request((2, 2, 2, 0, 1), (2, 1), 5), Request((0, 2), (2, 1), 5)]
    found = log_likelihoods(subject(policy='left_to_right'), requests, said.append)
    (short,) = score([Request((0, 1), (2, 1), 5)], policy='left_to_right')
    assert found[0] == short
    assert said == ['1 of 2 texts are longer than the 4 tokens that the model reads at once; the first tokens of their '
                    'contexts, at most 3, are left out']
    assert fitted(subject(), [requests[1]]) == ([requests[1]], None)


def test_a_text_longer_than_the_model_is_scored_in_windows_that_see_half_a_window_before():
    text = (2, 1, 0, 0, 1, 2)
    (found,) = score(numbered([((), text)]), policy='left_to_right')
    first, _ = in_groups((), text[:4], [[0], [1], [2], [3]])
    second, _ = in_groups(text[2:4], text[4:], [[2], [3]])
    assert found.log_likelihood == pytest.approx(first + second, abs=1e-9)


MODELS = {
    'windows': (toy_config(block_size=8), 'none', None),
    'windows with a head': (toy_config(block_size=8, add_sampler_head=True), 'wave', None),
    'a head that reads rows': (toy_config(block_size=8, add_sampler_head=True, sampler_kind='layer_neighbours'), 'wave',
                               None),
    'blocks': (toy_config(block_size=12, attention_type='block', block_length=(4,), add_sampler_head=True,
                          sampler_order='left_to_right'), 'left_to_right', 4)}


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('length', [7, 12, 19])
def test_what_generation_writes_has_the_probability_that_it_drew_with(name, length):
    """The very numbers of each step: windows, blocks with a cache, and prompts of other lengths in the rows."""
    config, head, block_length = MODELS[name]
    model = make_model(config)
    one = subject(model, head, block_length, policy='random', trunk_calls=3)
    scorer, generator = one.scorer(one.width(length)), keyed(9, 0, 3, 5)
    given = torch.tensor([0, 2, 5, 6, 3])[:, None]
    protected = torch.arange(length) < given
    start = torch.where(protected, torch.arange(length) % V0, MASK)
    settings = GenerationSettings('diffusion', DrawRule(ALLOWED), scorer.policy, head=head, block_length=block_length)
    made = generate(Network(model, TimingAccumulator()), Layout(start, protected), settings, generator)
    path = path_of_text(Network(model, TimingAccumulator()), Layout(made.tokens, protected), scorer, generator)
    torch.testing.assert_close(path.confidence, made.confidence, rtol=1e-9, atol=1e-12)
    assert (made.confidence.sum(1) < 0).all() and path.log_probabilities.equal(path.confidence)


# Writing --------------------------------------------------------------------------------------------------------------

TEXT = 'to be or not to be that is the question\n'


@pytest.fixture(scope='module')
def characters():
    return character_vocabulary(TEXT)


def writer(vocabulary, **options):
    model = awake(model_over(vocabulary)).double().eval().requires_grad_(False)
    return subject(model, vocabulary=vocabulary, allowed=allowed_ids(vocabulary.size, vocabulary.base_size), **options)


def test_texts_are_the_same_in_any_batch_and_end_before_the_stop_string(characters):
    asked = [('to be', Writing((), 9, 1.0)), ('or', Writing((), 9, 1.0)), ('to be', Writing((), 9, 1.0)),
             ('', Writing((), 30, 0.0)), ('not', Writing((), 3, 0.0))]
    found = written_texts(writer(characters, batch_size=5), asked, SILENT)
    assert [len(text) for text in found] == [9, 9, 9, 30, 3]
    assert found[0] != found[2], 'the same context asked for twice is drawn twice'
    assert found == written_texts(writer(characters, batch_size=1), asked, SILENT)
    stop = found[1][4:6]
    cut = written_texts(writer(characters), [(one, writing._replace(until=(stop, 'zzz'))) for one, writing in asked],
                        SILENT)
    assert cut[1] == found[1][:found[1].index(stop)]


def test_cutting():
    assert cut_at('one. two, three', (',', '.')) == 'one'
    assert cut_at('one', ('', 'x')) == 'one' and cut_at('', ('a',)) == ''


def test_a_pair_is_cut_into_tokens_as_one_text():
    """A vocabulary that knows 'ab' and ' a' as tokens."""
    table = {'ab': 10, ' a': 11, 'a': 1, 'b': 2, ' ': 3}

    def encode(text):
        ids = []
        while text:
            part = text[:2] if text[:2] in table else text[0]
            ids, text = [*ids, table[part]], text[len(part):]
        return ids

    vocabulary = SimpleNamespace(kind='bpe', encode=encode)
    assert pair_of(vocabulary, 'b', 'ab') == ([2], [10])
    assert pair_of(vocabulary, 'b ', 'a') == ([2], [11]), 'the space goes with the continuation'
    assert pair_of(vocabulary, 'a', 'b') == ([1], [2]), 'a token across the border would change the context'
    assert pair_of(vocabulary, '', 'ab') == ([], [10]) and pair_of(vocabulary, 'a', '') == ([1], [])


# What is refused ------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path, characters):
    def save(kind=CheckpointKind.UNMASKING, **changes):
        save_model(tmp_path / 'ckpt_best.pt', characters, model_over(characters, **changes), kind)
        return tmp_path
    return save


def load(folder, *arguments):
    found = configure(HarnessConfig, [f'--out_dir={folder}', '--device=cpu', *arguments])
    return load_subject(found.config, found.explicit)


def test_a_checkpoint_is_loaded(saved, characters):
    one = load(saved(), '--trunk_calls=3')
    assert (one.head, one.block_length, one.vocabulary.hash) == ('none', None, characters.hash)
    blocks = saved(CheckpointKind.BLOCK, attention_type='block', block_length=(2, 8))
    assert load(blocks).block_length == 8 and load(blocks, '--block_length=2').block_length == 2


@pytest.mark.parametrize('arguments, words', [
    (['--policy=magrin'], "policies holds 'magrin', but must be of .*; did you mean 'margin'"),
    (['--draws=9'], 'draws was given, but measure=likelihood does not ask for it'),
    (['--block_length=4'], 'block_length is 4, but the model has no blocks; leave it out'),
    (['--sampler_head=x'], 'sampler_head was given, but applies only with model'),
    (['--trunk_calls=0'], 'trunk_calls is 0, but must be at least 1'),
    (['--policies=random'], 'no such option')])
def test_options_that_are_wrong(saved, arguments, words):
    with pytest.raises(UserError, match=words):
        load(saved(), *arguments)


def test_models_that_fill_no_masks_and_bounds_in_blocks(saved):
    with pytest.raises(UserError, match='of kind causal, which fills no masks'):
        load(saved(CheckpointKind.CAUSAL, attention_type='causal'))
    with pytest.raises(UserError, match='writes in blocks; take measure=likelihood'):
        load(saved(CheckpointKind.BLOCK, attention_type='block', block_length=(2, 8)), '--measure=nelbo')


def test_requests_without_an_answer():
    with pytest.raises(UserError, match='1 of 2 requests have an empty continuation, the first of them number 1'):
        score(numbered([((1,), (2,)), ((1,), ())]))
    with pytest.raises(UserError, match='no exact likelihood .* under the policy llada'):
        score(numbered([((1,), (2,))]), policy='llada')
    with pytest.raises(UserError, match='1 of 1 texts have more tokens to score than the 4'):
        score(numbered([((), (0, 1, 2, 0, 1))]), measure='nelbo', policy='random')


def test_the_command_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    monkeypatch.setitem(sys.modules, 'lm_eval.__main__', None)
    with pytest.raises(UserError, match='needs the package lm_eval .*; install it: pip install lm_eval'):
        main([])
