"""Policy gradients: exact log-probabilities and their gradient, advantages, divergence, rewards, runs."""

import copy
import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import train as script
from core.batches import RowShare
from core.checkpoints.checkpoint import load_checkpoint
from core.common.drawing import DrawRule, allowed_ids
from core.common.errors import UserError
from core.common.randomness import RowRandom, keyed
from core.common.timing import TimingAccumulator
from core.data.vocabulary import Vocabulary
from core.logger import read_metrics
from core.reinforcement import (GroupObjective, Reinforcement, divergences, group_advantages, prompt_batches, write)
from core.rewards import LINE_ENDS, REPEATED, line_end_share, make_reward, repeated_share
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.path_likelihood import Scorer, path_log_probabilities
from core.sampling.policies import POLICIES
from core.sampling.prompt import Layout
from core.stages import Stage
from core.training_step import TrainingState, training_step
from helpers.runs import equal_runs
from helpers.runs import run as run_generator
from helpers.toys import CPU, V0, awake, model_over, save_model, toy_config, toy_plan, toy_settings
from model import GPT, GPTConfig
from sample_utils import judge_scores

ROOT = Path(__file__).parent.parent.parent
ALLOWED = allowed_ids(V0 + 4, V0)
T, GROUP, PROMPT = 8, 4, 2
MAIN = Stage({})


def share_of_zeros(tokens):
    return (tokens == 0).double().mean(1)


def asked_of(start: GPT, reward=share_of_zeros, policy='random', calls=3, head='none', kl_weight=0.1, prompt=PROMPT,
             mask=V0) -> Reinforcement:
    return Reinforcement(mask, GROUP, prompt, POLICIES[policy].make(iterations=calls), head, kl_weight, start, reward)


def toy_model(seed=3, **changes) -> GPT:
    return awake(GPT(toy_config(block_size=T, **changes), seed=seed), seed).double()


def plan_of(asked: Reinforcement, **changes):
    return toy_plan(block_size=T, batch_size=2 * GROUP, **changes)._replace(noise=asked)


def batch_of(asked: Reinforcement):
    return prompt_batches(plan_of(asked), 5, lambda count: count)[0]


# The path -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('policy', ['random', 'left_to_right', 'strided'])
@pytest.mark.parametrize('head', ['none', 'wave'])
def test_the_path_behind_a_prompt_is_the_one_that_was_drawn(policy, head):
    """Scoring gives each token the log-probability that generation drew it with, and protects the prompt."""
    model = toy_model(add_sampler_head=True)
    asked = asked_of(model, policy=policy, head=head)
    batch = batch_of(asked)
    protected, numbers = batch.inputs != V0, keyed(7, 0, 0, 2 * GROUP)
    made = generate(Network(model, TimingAccumulator()), Layout(batch.inputs, protected), GenerationSettings(
        'diffusion', DrawRule(ALLOWED), asked.policy, head=head), numbers)
    found = path_log_probabilities(Network(model, TimingAccumulator()), Layout(made.tokens, protected),
                                   Scorer(asked.policy, head, ALLOWED), numbers)
    assert found.requires_grad and (found < 0).equal(~protected) and protected.sum() == 2 * GROUP * PROMPT
    torch.testing.assert_close(found.detach(), made.confidence, rtol=1e-10, atol=1e-12)
    assert made.tokens[:, :PROMPT].equal(batch.targets[:, :PROMPT])


def test_a_group_shares_its_prompt_and_two_groups_do_not():
    batch = batch_of(asked_of(None, prompt=6))
    groups = batch.inputs.view(2, GROUP, T)
    assert groups.eq(groups[:, :1]).all() and not groups[0, 0].equal(groups[1, 0])
    assert (batch.inputs == V0).sum(1).tolist() == [T - 6] * 2 * GROUP


# The loss -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('head', ['none', 'wave'])
@pytest.mark.parametrize('kl_weight', [0.0, 2.0])
def test_the_loss_has_the_gradient_of_its_formula(head, kl_weight):
    """Against finite differences of - A log p + beta k3 of the texts that were drawn, in every direction of trunk, head
    and embeddings."""
    model, start = toy_model(add_sampler_head=True), toy_model(seed=4, add_sampler_head=True)
    asked = asked_of(start, head=head, kl_weight=kl_weight)
    batch, generator = batch_of(asked), RowRandom(1, 5, torch.arange(2 * GROUP))
    objective, kept = GroupObjective(model, ALLOWED, asked), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('core.reinforcement.write', lambda *given: kept.append((write(*given), given[-1])) or kept[-1][0])
        losses = objective(batch, MAIN, generator)
    losses.total.backward()
    (written, numbers), = kept
    assert losses.main.item() == pytest.approx(-written.rewards.mean().item(), rel=1e-6)
    rewards = written.rewards.numpy().reshape(2, GROUP)
    assert rewards.std(axis=1).min() > 0
    advantages = ((rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)).flatten()

    def formula():
        with torch.no_grad():
            log_p, log_start = (path_log_probabilities(Network(one, TimingAccumulator()), written.text, Scorer(
                asked.policy, head, ALLOWED), numbers) for one in (model, start))
        q = (log_start - log_p).exp()
        k3 = (q - 1 - q.log()).sum(1) / (T - PROMPT)
        return (-torch.tensor(advantages) * log_p.sum(1) / (T - PROMPT) + kl_weight * k3).mean().item()

    directions, moved = torch.Generator().manual_seed(3), {}
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=directions, dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(formula())
                parameter.sub_(direction, alpha=step)
        slope = (parameter.grad * direction).sum().item()
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-6), name
        moved[name] = parameter.grad.abs().sum().item() > 0
    trunk = {name: found for name, found in moved.items() if 'transformer' in name}
    assert all(trunk.values()) and moved['sampler_head.output_head.weight'] == (head == 'wave')


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=8, max_size=8))
def test_advantages_of_a_group_sum_to_zero_and_keep_its_order(rewards):
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64), GROUP).view(-1, GROUP)
    assert found.sum(1).abs().max() < 1e-9
    for group, values in zip(np.array(rewards).reshape(-1, GROUP), found.numpy()):
        np.testing.assert_allclose(values, (group - group.mean()) / (group.std() + 1e-4), rtol=1e-6, atol=1e-9)


def test_equal_rewards_and_the_start_itself_give_no_gradient():
    """No text is better than another and no token less probable than it was: nothing moves."""
    model = toy_model(add_sampler_head=True)
    asked = asked_of(copy.deepcopy(model), reward=lambda tokens: torch.full((len(tokens),), 0.3).double(), head='wave')
    losses = GroupObjective(model, ALLOWED, asked)(batch_of(asked), MAIN, RowRandom(1, 5, torch.arange(2 * GROUP)))
    losses.total.backward()
    assert losses.heads['kl'] == 0 and losses.total.item() == pytest.approx(-0.3)
    assert all(parameter.grad.abs().max() < 1e-12 for parameter in model.parameters())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=10, max_size=10))
def test_k3_is_never_negative_and_its_mean_is_the_divergence(logits):
    p, q = torch.tensor(logits, dtype=torch.float64).view(2, 5).log_softmax(1)
    found = divergences(p, q)
    assert found.min() >= -1e-12
    torch.testing.assert_close((p.exp() * found).sum(), (p.exp() * (p - q)).sum(), rtol=1e-9, atol=1e-12)


def test_micro_steps_change_nothing():
    """The same rows in one micro-step or in two: the same texts, prompts and gradients."""
    gradients, sums = [], []
    for rows in (RowShare(2 * GROUP), RowShare(GROUP, 2)):
        model = toy_model()
        asked = asked_of(toy_model(seed=4))
        plan = plan_of(asked)._replace(rows=rows)
        losses = [GroupObjective(model, ALLOWED, asked)(batch, MAIN, RowRandom(plan.seed, 5, batch.rows))
                  for batch in prompt_batches(plan, 5, lambda count: count)]
        sum(one.total for one in losses).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        sums.append(sum(one.sums for one in losses))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-9, atol=1e-12)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_texts_differ_between_iterations_and_rows():
    asked = asked_of(toy_model())
    objective, kept = GroupObjective(toy_model(), ALLOWED, asked), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('core.reinforcement.write', lambda *given: kept.append(write(*given)) or kept[-1])
        for iteration in (5, 6, 5):
            objective(batch_of(asked), MAIN, RowRandom(1, iteration, torch.arange(2 * GROUP)))
    first, second, again = (one.text.tokens for one in kept)
    assert first.equal(again) and not first.equal(second) and len(first[:GROUP].unique(dim=0)) > 1


@pytest.mark.parametrize('kl_weight, low, high', [(0.0, 0.95, 1.0), (5.0, 0.4, 0.75)])
def test_the_reward_of_a_toy_with_two_tokens_rises_to_its_maximum(kl_weight, low, high):
    """The share of the first of two tokens, about one half at the start; a strong divergence term holds it there."""
    config = GPTConfig(block_size=T, vocab_size=6, n_layer=1, n_head=2, n_embd=8, mask_token_id=2, add_sampler_head=True)
    model = GPT(config, seed=1)
    asked = asked_of(copy.deepcopy(model).eval(), head='wave', kl_weight=kl_weight, prompt=0, mask=2)
    plan = toy_plan(block_size=T, batch_size=8 * GROUP, tokens=np.zeros(100, dtype=np.uint16))._replace(noise=asked)
    state = TrainingState(model, allowed_ids(6, 2), CPU, plan, 'grpo', toy_settings(
        optimizer='adamw', learning_rate=2e-2, weight_decay=0.0))
    rewards = [-training_step(state, iteration, 2e-2).main.item() for iteration in range(50)]
    assert 0.3 < rewards[0] < 0.7 and low <= np.mean(rewards[-5:]) <= high


# Rewards ------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=12, max_size=12), min_size=1, max_size=4), st.integers(1, 12))
def test_the_repeated_share_counts_what_a_text_had_before(rows, length):
    rows = [row[:length] for row in rows]
    expected = []
    for row in rows:
        grams = [tuple(row[at:at + REPEATED]) for at in range(len(row) - REPEATED + 1)]
        expected.append(sum(gram in grams[:at] for at, gram in enumerate(grams)) / max(1, len(grams)))
    torch.testing.assert_close(repeated_share(torch.tensor(rows)), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize('text, share', [
    ('a,\nb\nc', 0.5), ('no line is finished.', 0.0), ('\n\n', 0.0), ('a.\n\n\nb!\n', 1.0), ('', 0.0),
    (''.join(f'x{mark}\n' for mark in LINE_ENDS) + 'y \n', 7 / 8)])
def test_line_ends_are_those_of_finished_lines(text, share):
    assert line_end_share(text) == share


def test_repetition_is_deducted_from_the_score_of_the_judge(tmp_path):
    vocabulary = Vocabulary(kind='characters', tokens=tuple('\n ' + string.ascii_letters))
    judge = model_over(vocabulary, mode='sequence_scorer', block_size=17)
    save_model(tmp_path / 'judge.pt', vocabulary, judge, 'judge')
    config = script.TrainConfig(reward='judge', judge_checkpoint_name=str(tmp_path / 'judge.pt'), block_size=16,
                                repetition_weight=0.5)
    tokens = torch.randint(vocabulary.base_size, (3, 16), generator=torch.Generator().manual_seed(1))
    tokens[1] = 5  # the same character throughout: 12 of 13 n-grams are repeated
    found = make_reward(config, vocabulary, torch.device('cpu'))(tokens)
    expected = judge_scores(judge, tokens).double() - torch.tensor([0, 0.5 * 12 / 13, 0]).double()
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match='must read 18 tokens'):
        make_reward(script.TrainConfig(reward='judge', judge_checkpoint_name=str(tmp_path / 'judge.pt'),
                                       block_size=17), vocabulary, torch.device('cpu'))


# Runs ---------------------------------------------------------------------------------------------------------------

TRAINED = '--init_from_checkpoint=out-generator/ckpt_best.pt'
SHORT = ('--training_type=grpo --reward=line_ends --group_size=4 --batch_size=8 --draw_calls=3 --prompt_length=4 '
         '--max_iters=4 --warmup_iters=0 --decay_lr=False --learning_rate=1e-2 --eval_interval=2 --eval_iters=1 '
         '--log_interval=1 --device=cpu --optimizer=adamw --min_lr=0 --sample_length=0').split()


@pytest.fixture
def generator(small_corpus):
    run_generator('--out_dir=out-generator', '--dropout=0', '--sample_length=0')


def run(*arguments: str) -> None:
    script.main([*SHORT, *arguments])


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        run(*arguments)
    return str(caught.value)


def test_a_run_makes_a_generator_of_the_same_shape_and_logs_what_it_watches(generator, capsys):
    run(TRAINED, '--out_dir=out-grpo')
    origin, made = load_checkpoint('out-generator/ckpt_best.pt'), load_checkpoint('out-grpo/ckpt_best.pt')
    assert made.kind == 'unmasking' and made.vocabulary_hash == origin.vocabulary_hash
    shape = ('n_embd', 'n_layer', 'block_size', 'add_sampler_head', 'sampler_context')
    assert [made.model_config[name] for name in shape] == [origin.model_config[name] for name in shape]
    assert not made.model_config['add_critic_head'] and made.config['dataset'] == 'tiny'
    moved = {name for name, weight in made.model.items() if not weight.equal(origin.weights()[name])}
    assert {'transformer.h.0.attn.c_proj.weight', 'transformer.wte.weight', 'sampler_head.hidden.weight'} <= moved
    records = read_metrics(Path('out-grpo/metrics.jsonl'))
    steps = [record for record in records if record['kind'] == 'iteration']
    assert steps[0]['train/kl'] == 0 < steps[-1]['train/kl'] and steps[0]['train/loss'] == -steps[0]['train/reward']
    first, *_, last = [record for record in records if record['kind'] == 'evaluation']
    assert first['val/kl'] == 0 < last['val/kl'] and first['val/loss'] == pytest.approx(-first['val/reward'])
    assert all(name in last for name in ('val/entropy', 'val/repetition', 'val/nelbo')) and last['val/entropy'] > 0
    out = capsys.readouterr().out
    assert 'options that are not given are those of out-generator/ckpt_best.pt' in out
    assert re.search(r'step 4: val loss -0\.\d+ .*reward 0\.\d+, kl 0\.\d+, entropy \d\.\d+, repetition', out)
    assert Path('out-grpo/loss.png').stat().st_size > 0
    lines = re.findall(r'iter \d+: loss (\S+) \(main (\S+), kl 0.04 x (\S+)\)', out)
    assert len(lines) == 4 and float(lines[-1][2]) > 0
    for total, main, kl in lines:  # the printed parts add up
        assert float(total) == pytest.approx(float(main) + 0.04 * float(kl), abs=2e-4)


def test_a_stopped_run_goes_on_exactly_and_evaluation_disturbs_nothing(generator):
    run(TRAINED, '--out_dir=whole')
    run(TRAINED, '--out_dir=parts', '--max_iters=2')
    script.main(['--init_from=resume', '--out_dir=parts', '--max_iters=4'])
    equal_runs(Path('whole'), Path('parts'))
    run(TRAINED, '--out_dir=seldom', '--eval_interval=4')
    one, other = load_checkpoint('whole/ckpt.pt'), load_checkpoint('seldom/ckpt.pt')
    assert all(one.model[name].equal(other.model[name]) for name in one.model)
    assert 'was trained with training_type=grpo' in refused(
        '--init_from=resume', '--training_type=unmasking', '--out_dir=whole', '--max_iters=5')


def test_a_start_that_was_replaced_is_not_taken_for_the_old_one(generator):
    """The divergence would be measured from another model without a word."""
    run(TRAINED, '--out_dir=out-grpo', '--max_iters=2')
    old = Path('out-generator/ckpt_best.pt').read_bytes()
    run_generator('--out_dir=out-generator', '--dropout=0', '--sample_length=0', '--seed=9', '--overwrite=True')
    found = refused('--init_from=resume', '--out_dir=out-grpo')
    assert 'init_from_checkpoint is out-generator/ckpt_best.pt, but that file was replaced since' in found
    run('--init_from=resume', '--out_dir=out-grpo', '--max_iters=3', '--force_resume=True')
    Path('out-generator/ckpt_best.pt').write_bytes(old)
    assert 'file was replaced' in refused('--init_from=resume', '--out_dir=out-grpo')


@pytest.mark.parametrize('arguments, words', [
    ([], 'goes on with a trained generator, but none is named; add --init_from_checkpoint='),
    (['--init_from_checkpoint=gone.pt'], 'init_from_checkpoint is gone.pt, but there is no such file; train one with'),
    ([TRAINED, '--group_size=1'], 'group_size is 1, but an advantage compares at least two texts; give 2 or more'),
    ([TRAINED, '--batch_size=6'], 'batch_size is 6, but must be a multiple of group_size (4)'),
    ([TRAINED, '--reward=judge'], 'no judge is named; add --judge_checkpoint_name='),
    ([TRAINED, '--reward=judge', '--judge_checkpoint_name=gone.pt'], 'judge_checkpoint_name is gone.pt, but there is'),
    ([TRAINED, '--reward=judge', '--judge_checkpoint_name=out-generator/ckpt_best.pt'], 'judges no text'),
    ([TRAINED, '--prompt_length=16'], 'prompt_length is 16, but must be below block_size (16)'),
    ([TRAINED, '--draw_calls=13'], 'draw_calls is 13, but each call reveals at least one of the 12 tokens'),
    ([TRAINED, '--dropout=0.1'], 'dropout is 0.1, but the log-probabilities of drawn texts are exact without it'),
    ([TRAINED, '--compile=True'], 'compile is True, but training_type=grpo'),
    ([TRAINED, '--n_embd=32'], 'does not fit this model'),
])
def test_what_cannot_learn_from_rewards_is_refused_in_one_sentence(generator, arguments, words):
    found = refused(*arguments)
    assert words in found and '\n' not in found


def test_a_causal_generator_is_refused(small_corpus):
    run_generator('--out_dir=causal', '--attention_type=causal', '--add_sampler_head=False', '--add_critic_head=False',
                  '--sample_length=0')
    found = refused('--init_from_checkpoint=causal/ckpt_best.pt')
    assert "a checkpoint of kind 'causal', which fills no masks; give one of kind unmasking" in found
    assert '\n' not in found


def test_a_head_that_had_not_begun_draws_nothing(small_corpus):
    run_generator('--out_dir=early', '--max_iters=2', '--sample_length=0', '--dropout=0', '--add_critic_head=False')
    run('--init_from_checkpoint=early/ckpt_best.pt', '--out_dir=out-grpo', '--max_iters=2')
    assert not load_checkpoint('out-grpo/ckpt.pt').model_config['add_sampler_head']
