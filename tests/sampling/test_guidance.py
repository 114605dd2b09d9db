"""Who says which tokens are wrong: the options of the policy remask, what they cost, and what contradicts itself."""

from types import SimpleNamespace

import pytest
import torch

from configurator import configure
from core.common.errors import UserError
from core.common.randomness import keyed
from core.sampling.options import SampleConfig
from core.sampling.policy_options import make_policy, option_problems
from helpers.sampling import VOCABULARY, sample, write_checkpoint
from helpers.toys import model_that_knows, save_model
from model import GPT

FEW = ('--num_samples=3', '--iterations=5', '--quality_metric=none')
HELPER = '--remasking_checkpoint_name=vowels.pt'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('guidance')
    write_checkpoint(folder / 'ckpt_best.pt', add_critic_head=True)
    write_checkpoint(folder / 'plain.pt')
    write_checkpoint(folder / 'young.pt', add_critic_head=True, start_critic_iteration=200, end_critic_iteration=300)
    save_model(folder / 'vowels.pt', VOCABULARY, model_that_knows(VOCABULARY, 'ae', mode='token_classifier'),
               'classifier')
    return folder


@pytest.fixture
def critic_calls(monkeypatch):
    """How often a critic head is asked, whoever asks and counts."""
    plain, calls = GPT.critic_scores, []
    monkeypatch.setattr(GPT, 'critic_scores', lambda model, tokens: calls.append(1) or plain(model, tokens))
    return calls


@pytest.mark.parametrize('arguments, line, asked', [
    ([], 'guidance self: no remasking model is named', False),
    (['--guidance=critic'], 'guidance critic: as asked for', True),
    (['--guidance=self'], 'guidance self: as asked for', False),
    (['--guidance=random'], 'guidance random: as asked for', False),
    (['--intelligent_remasking=False'], 'guidance random: intelligent_remasking is False', False),
    (['--randomness_strength=1'], 'guidance random: randomness_strength is 1', False),
    (['--schedule_mode=threshold', '--guidance=self'], 'guidance self: as asked for', False),
    (['--checkpoint_name=plain.pt'], 'guidance self: no remasking model is named', False)])
def test_one_line_names_the_guide_and_nobody_else_is_asked(folder, critic_calls, arguments, line, asked):
    made, said = sample(folder, *FEW, *arguments)
    assert [one for one in said.split('\n') if one.startswith('guidance ')][0].startswith(line)
    assert said.count('\nguidance ') + said.startswith('guidance ') == 1
    assert len(critic_calls) == made.network_calls - made.trunk_calls == (made.trunk_calls - 1 if asked else 0)


def test_a_remasking_model_guides_in_place_of_the_critic(folder, critic_calls):
    made, said = sample(folder, *FEW, HELPER)
    assert 'guidance model: remasking_checkpoint_name is vowels.pt' in said
    assert sample(folder, *FEW, HELPER, '--guidance=model')[0].texts == made.texts
    assert not critic_calls and made.network_calls == 9


def test_every_guide_writes_other_texts_and_two_words_for_one_write_the_same(folder):
    texts = {guide: sample(folder, *FEW, f'--guidance={guide}', *([HELPER] if guide == 'model' else []))[0].texts
             for guide in ('critic', 'self', 'random', 'model')}
    assert len(set(map(tuple, texts.values()))) == 4
    assert sample(folder, *FEW)[0].texts == texts['self']
    assert sample(folder, *FEW, '--intelligent_remasking=False')[0].texts == texts['random']
    assert sample(folder, *FEW, '--randomness_strength=1.0')[0].texts == texts['random']
    plain = [sample(folder, *FEW, '--checkpoint_name=plain.pt', *more)[0].texts for more in ([], ['--guidance=self'])]
    assert plain[0] == plain[1]


def test_the_policy_itself_asks_nobody_where_every_position_is_drawn():
    """As evaluate.py and previews build it, without the options of sample.py."""
    def refuse():
        raise AssertionError('nobody asked the critic')

    protected = torch.zeros(2, 16, dtype=torch.bool)
    view = SimpleNamespace(protected=protected, critic=refuse, step=0, generator=keyed(1, 0, 0, 2),
                           prediction=SimpleNamespace(tolerance=0.0))
    remasked = make_policy('remask', iterations=3, randomness_strength=1.0).remask(view)
    assert remasked.sum(1).tolist() == [15, 15]
    with pytest.raises(AssertionError, match='nobody asked'):
        make_policy('remask', iterations=3, randomness_strength=0.9).remask(view)


def test_a_policy_that_cannot_do_without_a_critic_has_it_all_the_same(folder, critic_calls):
    made, said = sample(folder, *FEW, '--sampling_policy=token_critic')
    assert len(critic_calls) == 4 == made.network_calls - made.trunk_calls and 'guidance' not in said


def test_nothing_is_said_where_nothing_is_remasked(folder):
    for arguments in (['--iterations=1'], ['--iterations=3', '--sampling_policy=random']):
        assert 'guidance' not in sample(folder, '--num_samples=1', *arguments)[1]


@pytest.mark.parametrize('arguments, words', [
    (['--guidance=model'], 'guidance is model, but no remasking model is named; add --remasking_checkpoint_name'),
    ([HELPER, '--guidance=critic'], 'guidance=critic does not ask it; take guidance=model'),
    ([HELPER, '--guidance=self'], 'guidance=self does not ask it; take guidance=model'),
    ([HELPER, '--guidance=random'], 'but guidance=random remasks at random; leave one of them out'),
    ([HELPER, '--intelligent_remasking=False'], 'but intelligent_remasking=False remasks at random'),
    (['--guidance=critic', '--intelligent_remasking=False'], 'guidance is critic, but intelligent_remasking is False'),
    (['--guidance=self', '--intelligent_remasking=False'], 'guidance is self, but intelligent_remasking is False'),
    (['--guidance=random', '--intelligent_remasking=True'], 'guidance is random, but intelligent_remasking is True'),
    (['--guidance=random', '--schedule_mode=threshold'], 'schedule_mode is threshold, but with guidance=random nothing'),
    (['--intelligent_remasking=False', '--schedule_mode=threshold'], 'with intelligent_remasking=False nothing tells'),
    (['--guidance=random', '--randomness_strength=0.2'], 'randomness_strength does not apply to guidance=random'),
    (['--guidance=critic', '--randomness_strength=1'], 'randomness_strength is 1, which leaves guidance=critic nothing'),
    ([HELPER, '--randomness_strength=1'], 'randomness_strength is 1, which leaves the remasking model nothing'),
    (['--guidance=self', '--sampling_policy=random'], 'guidance does not apply to sampling_policy=random'),
    (['--guidance=self', '--sampling_method=multinomial'], 'guidance does not apply to sampling_method=multinomial')])
def test_each_contradiction_is_one_sentence(arguments, words):
    configuration = configure(SampleConfig, arguments)
    problem, = option_problems(configuration.config, configuration.explicit)
    assert words in problem and '\n' not in problem


@pytest.mark.parametrize('name, why', [('plain.pt', 'the checkpoint has none'), ('young.pt', 'its stage begins at')])
def test_a_critic_that_is_not_there_cannot_guide(folder, name, why):
    with pytest.raises(UserError, match=f'guidance is critic, but .*{why}.*; take guidance=self'):
        sample(folder, *FEW, f'--checkpoint_name={name}', '--guidance=critic')


def test_random_guidance_and_its_contrary_may_be_said_twice(folder):
    assert sample(folder, *FEW, '--guidance=random', '--intelligent_remasking=False')[0].texts == \
        sample(folder, *FEW, '--guidance=random')[0].texts
    assert sample(folder, *FEW, '--guidance=critic', '--intelligent_remasking=True')[0].texts == \
        sample(folder, *FEW, '--guidance=critic')[0].texts
