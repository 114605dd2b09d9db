"""The arena: rows against the measure likelihood, paired differences, equal trunks, what is refused, the page."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configurator import configure
from core.common.drawing import DrawRule, allowed_ids
from core.common.errors import UserError
from core.common.randomness import keyed
from core.evaluation.arena import label, multiply_adds
from core.evaluation.options import EvaluateConfig
from core.evaluation.run import run_evaluation
from core.study.arena import Contestant, compared, reference_of, trunk_hash, write_arena
from helpers.toys import awake, model_over, save_model, toy_config
from model import GPT
from sample_utils import FillTask, Filler

LAYER = {'sampler_kind': 'layer', 'sampler_order': 'left_to_right'}
PAGE = '# Arena\n\n<!-- evaluate.py writes arena from here -->\nold\n<!-- evaluate.py writes arena to here -->\nend\n'


def arena(*arguments):
    said, options = [], ['--device=cpu', '--measure=arena', '--windows=6', '--num_samples=2', '--trunk_calls=[1,3]']
    configuration = configure(EvaluateConfig, [*options, *arguments])
    return write_arena(configuration.config, configuration.explicit, said.append), '\n'.join(said)


@pytest.fixture
def heads(small_corpus):
    """Two trunks, each with two heads, and the trunk of the first alone."""
    for seed in (1, 2):
        trunk = model_over(small_corpus.vocabulary, seed=seed, block_size=8)
        for name, changes in (('neighbours', {}), ('layer', LAYER)):
            model = model_over(small_corpus.vocabulary, seed=seed, block_size=8, add_sampler_head=True, **changes)
            model.load_state_dict(trunk.state_dict(), strict=False)
            save_model(Path(f'runs/{seed}/{name}/ckpt.pt'), small_corpus.vocabulary, model, config={'dataset': 'tiny'})
    save_model(Path('runs/1/trunk/ckpt.pt'), small_corpus.vocabulary, trunk, config={'dataset': 'tiny'})
    return small_corpus


def test_rows_are_those_of_the_likelihood_and_differences_are_paired(heads):
    Path('docs').mkdir()
    Path('docs/arena.md').write_text(PAGE)
    rows, said = arena('--checkpoints=runs/*/*/ckpt.pt', '--report=docs/arena.md', '--policies=random,strided')
    assert 'runs/1/trunk/ckpt.pt is left out: it has no trained sampler head' in said
    assert [row['head'] for row in rows[:3]] == ['independent draws', 'neighbours, W 16',
                                                 'layer, W 16, A 16'] and len(rows) == 2 * 2 * 3
    expected = {}
    for seed in (1, 2):
        for name, heads in (('neighbours', 'none,wave'), ('layer', 'left_to_right')):
            options = configure(EvaluateConfig, [
                '--device=cpu', '--measure=likelihood', '--windows=6', '--trunk_calls=[1,3]', f'--heads={heads}',
                '--policies=random,strided', f'--out_dir=runs/{seed}/{name}', '--checkpoint_name=ckpt.pt'])
            for row in run_evaluation(options.config, options.explicit, lambda line: None)['likelihood']:
                expected.setdefault((row['policy'], row['trunk_calls'], row['head']), []).append(row['window_nats'])
    ways = {'independent draws': 'none', 'neighbours, W 16': 'wave', 'layer, W 16, A 16': 'left_to_right'}
    for row in rows:
        mine, base = (torch.tensor(expected[row['policy'], row['trunk_calls'], way], dtype=torch.float64)
                      for way in (ways[row['head']], 'wave'))
        difference = mine - base
        assert row['nats'] == pytest.approx(mine.mean().item()) and row['seeds'] == 2
        assert row['difference'] == pytest.approx(difference.mean().item(), abs=1e-9)
        assert row['difference_error'] == pytest.approx((difference.mean(0).std() / 6 ** 0.5).item(), abs=1e-9)
        assert [row['lowest'], row['highest']] == pytest.approx(sorted(difference.mean(1).tolist()))
        assert ('verified_calls' in row) == row['head'].startswith('layer') and row['seconds'] > 0
    one_call = {row['head']: row['head_calls'] for row in rows[:3]}
    assert one_call['independent draws'] == 0 and one_call['layer, W 16, A 16'] == 8
    page, kept = Path('docs/arena.md').read_text(), json.loads(Path('docs/arena.json').read_text())
    assert page.startswith('# Arena') and page.endswith('end\n') and 'old' not in page and page.count('### ') == 2
    assert f'{rows[2]["difference"]:+.4f} ({rows[2]["difference_error"]:.4f})' in page and '![' in page
    assert len(kept['contestants']) == 6 and Path('docs/arena.png').stat().st_size > 5000
    assert '--checkpoints=' in kept['command'] and kept['rows'][2]['nats'] == rows[2]['nats']
    again, said = arena('--checkpoints=runs/*/*/ckpt.pt', '--policies=random,strided')
    assert again == rows and '4 of 4 results are known already' in said


def test_what_cannot_be_compared_is_said(heads):
    for arguments, words in (
            ((), 'give --checkpoints'), (('--checkpoints=runs/3/*.pt',), "holds 'runs/3/*.pt'"),
            (('--checkpoints=runs/1/trunk/ckpt.pt',), 'none of the checkpoints'),
            (('--checkpoints=runs/1/layer/ckpt.pt',), 'sampler_kind=neighbours'),
            (('--checkpoints=runs/1/*/ckpt.pt,runs/2/neighbours/ckpt.pt',), 'train it there'),
            (('--checkpoints=runs/1/*/ckpt.pt', '--report=docs/none.md'), 'cannot read')):
        with pytest.raises(UserError) as caught:
            arena('--trunk_calls=[1]', '--policies=strided', *arguments)
        assert words in str(caught.value), arguments
    with pytest.raises(UserError, match='take measure=arena'):
        options = configure(EvaluateConfig, ['--device=cpu', '--measure=nelbo', '--checkpoints=x.pt'])
        run_evaluation(options.config, options.explicit, print)


def test_one_head_twice_on_one_trunk_is_refused():
    twice = [Contestant(path, 'aa', 'neighbours, W 8', []) for path in ('one.pt', 'two.pt')]
    with pytest.raises(UserError, match='one.pt and two.pt hold the same head'):
        reference_of(twice)
    assert reference_of(twice[:1]) == 'neighbours, W 8'


def test_differences_of_windows_that_move_together_are_sure():
    """Windows far apart and a head that is better by the same in each: the standard error is 0."""
    def rows(*shifts):
        return [[{'policy': 'random', 'trunk_calls': 1, 'trunk': 10.0, 'head': cost, 'window_nats': [
            number + shift for number in range(4)]}] for shift, cost in zip(shifts, (0.0, 2.0, 3.0))]

    contestants = [Contestant('x', trunk, name, one) for trunk, shifts in (('a', (1, 0, -0.5)), ('b', (1, 0, -0.25)))
                   for name, one in zip(('independent draws', 'neighbours', 'layer'), rows(*shifts))]
    for row in contestants:
        row.rows[0].update(seconds=0.5, head_calls=1)
    found = {row['head']: row for row in compared(contestants)}
    assert found['layer']['difference'] == -0.375 and found['layer']['difference_error'] == 0
    assert (found['layer']['lowest'], found['layer']['highest']) == (-0.5, -0.25)
    assert found['layer']['cost'] == 13 and found['neighbours']['difference'] == 0


def test_a_trunk_is_told_by_its_weights_and_not_by_its_heads():
    plain, headed = (GPT(toy_config(**changes), seed=4) for changes in ({}, {'add_sampler_head': True, **LAYER}))
    assert trunk_hash(plain) == trunk_hash(headed) != trunk_hash(GPT(toy_config(), seed=5))


def test_labels_tell_heads_apart():
    kinds = [{}, {'sampler_context': 2}, {'sampler_n_embd': 4}, LAYER, {**LAYER, 'sampler_order': 'wave'},
             {**LAYER, 'sampler_attention_n_embd': 4}, {'sampler_kind': 'layer_neighbours'}, {'sampler_kind': 'rerun'},
             {**LAYER, 'sampler_gate': True}, {**LAYER, 'sampler_zero_hidden': True}, {'sampler_residual': False},
             {'sampler_output': 'shared_detached'}, {'sampler_order': 'left_to_right'}]
    labels = [label(toy_config(add_sampler_head=True, **changes)) for changes in kinds]
    assert len(set(labels)) == len(kinds) and labels[0] == 'neighbours, W 8' and labels[3] == 'layer, W 8, A 8'


@pytest.mark.parametrize('kind', ['layer', 'layer_neighbours', 'rerun', 'neighbours'])
def test_the_multiply_adds_of_a_head_are_those_that_a_fill_makes(kind):
    """Counted by torch while a row is filled; the head's tables and the trunk's own logits are counted apart."""
    config = toy_config(block_size=6, add_sampler_head=True, sampler_kind=kind, sampler_n_embd=12)
    model = awake(GPT(config)).double().eval().requires_grad_(False)
    tokens, T, D, V = torch.full((1, 6), config.mask_token_id), 6, 8, config.vocab_size
    filler = Filler(model, 'wave')
    tables, task = filler.tables, FillTask(tokens, model.encode(tokens), DrawRule(allowed_ids(V, 3)), keyed(1, 0, 0, 1))
    assert tables is filler.tables
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # another kernel is not counted
        filler.fill(task)
    logits, counted = 2 * T * D * V, counter.get_total_flops()
    _, head = multiply_adds(config, 0, 1, 'wave')
    if kind == 'neighbours':  # its first token comes from `lm_head`, where the seed is sought too
        assert counted - 2 * logits == 2 * (T - 1) * head + 2 * D * 12
    else:  # and the key that is always there
        assert counted - logits == 2 * T * (head + 2 * 8)
