"""Block models write: the cache changes nothing, calls are counted, and what was written has the likelihood that two
streams give it."""

import dataclasses

import pytest
import torch

from core.common.drawing import DrawRule, allowed_ids
from core.common.errors import UserError
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.sampling.block_network import BlockNetwork
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.policies import POLICIES
from core.sampling.policy_options import make_policy
from core.sampling.prompt import Layout
from core.validation import one_call_terms
from helpers.sampling import sample, write_checkpoint
from helpers.toys import V0, awake, toy_config
from model import GPT

T, MASK = 12, V0
HEAD = {'add_sampler_head': True, 'sampler_context_left': 3, 'sampler_context_right': 1,
        'sampler_order': 'left_to_right', 'sampler_gate': True}
ALLOWED = allowed_ids(V0 + 4, V0)


def block_model(*lengths: int, **changes) -> GPT:
    config = toy_config(block_size=T, attention_type='block', block_length=lengths, n_layer=2, **changes)
    return awake(GPT(config)).double().eval().requires_grad_(False)


def layout(rows: int, length: int, prompt: int = 0) -> Layout:
    tokens = torch.full((rows, length), MASK)
    tokens[:, :prompt] = torch.arange(prompt) % V0
    return Layout(tokens, tokens != MASK)


def written(model: GPT, start: Layout, policy: str = 'random', head: str = 'none', b: int = 4, seed: int = 5, rows=None,
            **options):
    network = Network(model, TimingAccumulator(torch.device('cpu')))
    settings = GenerationSettings('diffusion', DrawRule(ALLOWED), make_policy(policy, **options), head=head,
                                  block_length=b, use_critic=model.config.add_critic_head)
    rows = keyed(seed, 0, 0, len(start.tokens)) if rows is None else rows
    return generate(network, start, settings, rows), network


class Uncached(BlockNetwork):
    """Reads everything again at every call."""

    def _read(self, tokens):
        before = torch.cat((self.model_text, tokens), dim=1)
        return self.model.encode_blocks(before, self._block_length, self.model.new_cache(len(tokens)), 0)[
            :, self.model_text.size(1):]

    def begin(self, text, start, stop):
        super().begin(text, start, stop)
        self.model_text = text[:, self._first:start]


@pytest.mark.parametrize('policy, options', [
    (name, {'iterations': 2} if 'iterations' in row.options else {}) for name, row in POLICIES.items()])
@pytest.mark.parametrize('head', ['none', 'left_to_right'])
def test_the_cache_changes_no_token(monkeypatch, policy, options, head):
    """Every policy, a prompt that ends inside a block, a text that is longer than the training context."""
    cache_changes_no_token(monkeypatch, block_model(4, 12, add_critic_head=True, **HEAD), policy, options, head)


@pytest.mark.parametrize('head', ['none', 'left_to_right'])
@pytest.mark.parametrize('iterations', [1, 2])
def test_the_cache_changes_no_token_of_a_model_that_predicts_the_next_position(monkeypatch, head, iterations):
    model = block_model(4, 12, predicts='next', **HEAD)
    cache_changes_no_token(monkeypatch, model, 'random', {'iterations': iterations}, head)


def cache_changes_no_token(monkeypatch, model, policy, options, head):
    start = layout(3, 30, prompt=6)
    cached, network = written(model, start, policy, head, **options)
    import core.sampling.generation as room
    monkeypatch.setattr(room, 'BlockNetwork', Uncached)
    plain, other = written(model, start, policy, head, **options)
    assert torch.equal(cached.tokens, plain.tokens) and (cached.tokens < V0).all()
    assert torch.equal(cached.tokens[:, :6], start.tokens[:, :6])
    torch.testing.assert_close(cached.confidence, plain.confidence)
    assert (network.trunk_calls, network.network_calls) == (other.trunk_calls, other.network_calls)


@pytest.mark.parametrize('iterations', [1, 2, 4])
def test_a_block_costs_what_its_policy_makes(iterations):
    _, network = written(block_model(4), layout(2, 24), iterations=iterations)
    assert network.trunk_calls == 6 * iterations
    _, network = written(block_model(4), layout(2, 23, prompt=9), iterations=iterations)
    assert network.trunk_calls == 2 * iterations + 2 * min(3, iterations)  # two blocks are prompt, two have 3 masks


@pytest.mark.parametrize('b', [2, 4])
def test_what_was_written_has_the_likelihood_of_two_streams(b):
    """One call a block through the head, against teacher forcing of the whole text at once: context, gate and cache."""
    model = block_model(b, **HEAD)
    made, _ = written(model, layout(4, T), head='left_to_right', b=b, iterations=1)
    torch.testing.assert_close(made.confidence.mean(1), -one_call_terms(model, made.tokens, b, ALLOWED))


def test_a_row_does_not_depend_on_its_batch():
    model, start = block_model(4, **HEAD), layout(5, 22, prompt=3)
    together, _ = written(model, start, head='left_to_right', iterations=2)
    for row in (0, 3):
        alone, _ = written(model, Layout(*(part[row:row + 1] for part in start)), head='left_to_right', iterations=2,
                           rows=keyed(5, 0, row, 1))
        assert torch.equal(alone.tokens[0], together.tokens[row])


def test_one_block_is_the_bidirectional_model():
    model, start = block_model(4, 12), layout(3, T, prompt=2)
    plain = GPT(dataclasses.replace(model.config, attention_type='bidirectional', block_length=())).double().eval()
    plain.load_state_dict(model.state_dict())
    made = [written(one, start, 'mdlm', b=12, iterations=5)[0] for one in (model, plain)]
    assert torch.equal(made[0].tokens, made[1].tokens)


def test_blocks_of_one_write_with_the_causal_order():
    """At b = 1 the log-probability of each token is that of its masked place given the text before it."""
    model = block_model(1)
    made, network = written(model, layout(3, T), b=1, iterations=1)
    hidden = model.encode_streams(torch.full_like(made.tokens, MASK), made.tokens, 1)
    expected = model.lm_head(hidden).masked_fill(~ALLOWED, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(made.confidence, expected.gather(2, made.tokens[..., None]).squeeze(2))
    assert network.trunk_calls == T


# Options ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arguments, words', [
    (['--infill_text=a_b'], ['infill_text', 'sees nothing after the block in work', 'block_length=16 too']),
    (['--start_text=a', '--seed_placement=random'], ['seed_placement=random', 'both sides']),
    (['--preset=careful'], ['preset is careful', 'whole windows', 'leave it out']),
    (['--sampling_method=multinomial'], ['redraws a whole window', '--sampling_method=diffusion']),
    (['--block_length=8'], ['block_length is 8', 'trained with block_length=4']),
])
def test_what_a_block_model_cannot_do_is_refused_in_a_sentence(tmp_path, arguments, words):
    write_checkpoint(tmp_path / 'ckpt_best.pt', kind='block', attention_type='block', block_length=(4,))
    with pytest.raises(UserError) as error:
        sample(tmp_path, *arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_model_of_blocks_and_of_whole_windows_takes_presets_for_the_latter(tmp_path):
    write_checkpoint(tmp_path / 'ckpt_best.pt', kind='block', attention_type='block', block_length=(4, 16))
    _, said = sample(tmp_path, '--preset=fast', '--block_length=16', '--quality_metric=none')
    assert 'preset fast' in said
    with pytest.raises(UserError, match='take --block_length=16, which it was trained with too'):
        sample(tmp_path, '--preset=fast', '--block_length=4')
