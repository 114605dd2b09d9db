"""Training of block models: what a step learns from, micro-steps and ranks, tiles in place of the dense mask, isolation
of the head, resume, bad options."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from core.batches import unmasking_batches
from core.checkpoints.checkpoint import load_checkpoint
from core.checkpoints.weights import build_model
from core.common.drawing import DrawRule, allowed_ids
from core.common.randomness import Purpose, RowRandom, keyed
from core.common.runtime import Runtime
from core.noise import BlockNoise, SeenNeighbours
from core.logger import read_metrics
from core.objective import Objective
from core.sampler_head import SamplerWindow
from core.stages import Stage
from core.validation import block_terms, one_call_terms
from helpers.runs import equal_runs, refused, run
from helpers.toys import V0, awake, toy_config, toy_plan, toy_state
from model import GPT
from sample_utils import Filler, FillTask

T = 12
ORDERED = {'add_sampler_head': True, 'sampler_order': 'left_to_right', 'sampler_context_left': 3,
           'sampler_context_right': 0, 'sampler_gate': True}
ALLOWED = allowed_ids(V0 + 4, V0)


def block_config(*lengths, **changes):
    return toy_config(block_size=T, attention_type='block', block_length=lengths, **changes)


def block_plan(*lengths, **changes):
    window = SeenNeighbours(SamplerWindow(3, 0), 'left_to_right')
    noise = BlockNoise(lengths, whole_share=changes.pop('whole_share', 0.5))
    return toy_plan(block_size=T, blocks=noise, neighbours=window, **changes)


def loss_of(model, batches):
    objective, stage = Objective(model, ALLOWED), Stage({head: 1.0 for head in ('sampler', 'critic')[
        :1 + model.config.add_critic_head]})
    losses = [objective(batch, stage, RowRandom(1, 0, batch.rows)) for batch in batches]
    return sum(one.main for one in losses), *(sum(one.heads[head] for one in losses) for head in stage.heads)


@pytest.mark.parametrize('lengths', [(4,), (1, 4, 12)])
def test_micro_steps_change_nothing(lengths):
    model = awake(GPT(block_config(*lengths, add_critic_head=True, **ORDERED)))
    one = loss_of(model, unmasking_batches(block_plan(*lengths, batch_size=8), 3, lambda count: count))
    plan = block_plan(*lengths, batch_size=2, micro_steps=4)
    four = loss_of(model, unmasking_batches(plan, 3, lambda count: count))
    torch.testing.assert_close(one, four)


@pytest.mark.parametrize('lengths', [(4,), (2, 6)])
def test_the_losses_are_cross_entropies_at_masked_places_of_blocks_read_one_by_one(lengths):
    """Each block by itself: the clean text before it and its masked tokens in one plain pass; the head's input by
    hand."""
    model = awake(GPT(block_config(*lengths, **ORDERED))).double()
    batch, = unmasking_batches(block_plan(*lengths, batch_size=4, loss_weighting='masked_mean'), 1, lambda count: count)
    main, sampler = loss_of(model, [batch])
    trunk, head, masked = 0.0, 0.0, int((batch.inputs == V0).sum())
    embedding = model.neighbour_embedding()
    for text, noisy, b in zip(batch.targets, batch.inputs, batch.block_length.tolist()):
        for first in range(0, T, b):
            read = torch.cat((text[:first], noisy[first:first + b]))[None]
            hidden = model.encode_blocks(read, b, model.new_cache(1), 0)[0]
            for place in range(first, first + b):
                if noisy[place] != V0:
                    continue
                logits = model.lm_head(hidden[place])
                shown = [text[place - step] if place >= step else None for step in (3, 2, 1)]
                slots = [torch.zeros_like(embedding[0]) if token is None else embedding[token] for token in shown]
                new = sum(place - step >= first and int(noisy[place - step]) == V0 for step in (1, 2, 3))
                made = model.sampler_head(torch.cat((*slots, hidden[place])), logits, model.lm_head.weight,
                                          torch.tensor(new))
                trunk -= logits[:V0].log_softmax(0)[text[place]] / masked
                head -= made[:V0].log_softmax(0)[text[place]] / masked
    assert main.item() == pytest.approx(trunk.item(), rel=1e-5)
    assert sampler.item() == pytest.approx(head.item(), rel=1e-5)


@pytest.mark.parametrize('lengths, predicts, recompute', [((4,), 'own', True), ((1, 4, 12), 'next', False)])
def test_compiled_steps_have_the_same_losses_and_gradients_by_tiles(lengths, predicts, recompute, monkeypatch):
    """Without fused kernels there is a backward pass on a processor too; torch only does not offer it. One graph
    serves all batches, although the tiles of rows differ."""
    monkeypatch.setattr(flex_attention, '_validate_device', lambda *tensors: None)
    torch.compiler.reset()
    model = awake(GPT(block_config(*lengths, n_layer=2, predicts=predicts, **ORDERED)))
    for block in model.transformer['h']:
        block.recompute = recompute
    objective, counted = Objective(model, ALLOWED), CompileCounterWithBackend('aot_eager')
    dense = objective.trunk_and_sampler_losses
    tiled = torch.compile(dense, backend=counted, fullgraph=True, dynamic=False)
    for step in range(3):
        batch, = unmasking_batches(block_plan(*lengths, batch_size=3), step, lambda count: count)
        batch = batch._replace(**{name: getattr(batch, name)[:12] for name in (
            'positions', 'main_weights', 'mean_weights', 'neighbours', 'new')})  # one shape
        found = []
        for objective.tiled, objective.trunk_and_sampler_losses in ((False, dense), (True, tiled)):
            model.zero_grad()
            losses = objective(batch, Stage({'sampler': 1.0}), keyed(1, 0, 0, 3))
            losses.total.backward()
            found.append([losses.main, *(weight.grad for weight in model.parameters())])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert counted.frame_count == 1


@pytest.mark.parametrize('attention_type, compile, ranks, tiled', [
    ('block', True, 1, True), ('block', False, 1, False), ('block', True, 2, False), ('bidirectional', True, 1, False)])
def test_compiled_steps_of_one_rank_read_tiles_where_that_pays(attention_type, compile, ranks, tiled, monkeypatch):
    asked = []
    monkeypatch.setattr('core.objective.tiles_pay', lambda *shape: asked.append(shape) is None)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)
    config = block_config(4, dropout=0.1) if attention_type == 'block' else toy_config(block_size=T)
    state = toy_state(config, block_plan(4), runtime=Runtime(torch.device('cpu'), torch.float32, compile, 0, ranks))
    assert state.objective.tiled is tiled
    assert asked == ([(torch.device('cpu'), T, config.n_embd // config.n_head, 0.1)] if tiled else [])


@pytest.mark.parametrize('gradient', ['head', 'trunk'])
def test_the_head_moves_the_trunk_only_where_that_is_asked_for(gradient):
    model = awake(GPT(block_config(4, sampler_gradient=gradient, **ORDERED)))
    _, sampler = loss_of(model, unmasking_batches(block_plan(4, batch_size=4), 1, lambda count: count))
    sampler.backward()
    moved = {name.split('.')[0] for name, parameter in model.named_parameters()
             if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    assert moved == ({'sampler_head'} if gradient == 'head' else {'sampler_head', 'transformer'})


def test_the_bound_is_an_average_over_masks_and_lies_above_the_exact_value():
    """One block of the whole window: all subsets of each size against the any-order form; b = 1 is exact."""
    model = awake(GPT(block_config(1, 4))).double().eval()
    text = torch.randint(0, V0, (400, T), generator=torch.Generator().manual_seed(1))
    hidden = model.encode_streams(torch.full_like(text, V0), text, 1)
    exact = -model.lm_head(hidden)[..., :V0].log_softmax(-1).gather(2, text[..., None]).squeeze(2).mean(1)
    torch.testing.assert_close(block_terms(model, text, 1, keyed(1, 0, 0, 400), ALLOWED), exact)
    row = text[:1].expand(4000, -1)
    found = block_terms(model, row, 4, keyed(1, 0, 0, 4000), ALLOWED)
    expected = 0.0
    for first in range(0, T, 4):
        for chosen in range(1, 16):
            mask = torch.zeros(1, T, dtype=torch.bool)
            mask[0, first:first + 4] = torch.tensor([bool(chosen >> bit & 1) for bit in range(4)])
            hidden = model.encode_streams(text[:1].masked_fill(mask, V0), text[:1], 4)
            losses = -model.lm_head(hidden)[..., :V0].log_softmax(-1).gather(2, text[:1, :, None]).squeeze(2)
            size = int(mask.sum())
            subsets = (4, 6, 4, 1)[size - 1]
            expected += losses[mask].mean().item() / 4 / subsets / 3
    assert found.mean().item() == pytest.approx(expected, abs=4 * found.std().item() / 4000 ** 0.5)


@pytest.mark.parametrize('changes', [ORDERED, {**ORDERED, 'sampler_context_right': 2}])
def test_the_critic_judges_blocks_that_are_filled_as_generation_fills_them(changes):
    """Block by block: the draws after the true text before the block, and the critic's call on that text and the
    filled block."""
    lengths = (3, 6)
    model = awake(GPT(block_config(*lengths, add_critic_head=True, **changes))).double()
    window = SeenNeighbours(model.config.sampler_window, 'left_to_right')
    plan = toy_plan(block_size=T, blocks=BlockNoise(lengths, whole_share=0.25), neighbours=window, batch_size=4)
    batch, = unmasking_batches(plan, 1, lambda count: count)
    expected, filler, rule = 0.0, Filler(model, 'left_to_right'), DrawRule(ALLOWED)
    for row, (text, noisy, b) in enumerate(zip(batch.targets, batch.inputs, batch.block_length.tolist())):
        for first in range(0, T, b):
            both = torch.cat((text[:first], noisy[first:first + b]))[None]
            hidden = model.encode_blocks(both, b, model.new_cache(1), first)[:, first:]
            left = model.config.sampler_window.left
            before = torch.cat((torch.full((left,), V0), text[:first]))[-left:][None]
            task = FillTask(both[:, first:], hidden, rule, RowRandom(1, 0, torch.tensor([row * T + first])),
                            purpose=Purpose.CRITIC_FILL, left_context=before)
            filled = filler.fill(task).tokens
            read = torch.cat((text[None, :first], filled), dim=1)
            logits = model.critic_logits(model.encode_blocks(read, b, model.new_cache(1), first))[0, first:]
            masked = noisy[first:first + b] == V0
            wrong = (filled[0] != text[first:first + b]).double()
            expected += F.binary_cross_entropy_with_logits(logits, wrong, reduction='none')[masked].sum()
    found = loss_of(model, [batch])[2]
    assert found.item() == pytest.approx(expected.item() / (batch.inputs == V0).sum().item(), rel=1e-5)


def test_one_call_is_what_the_head_says_given_all_on_its_left():
    model = awake(GPT(block_config(4, **ORDERED))).double().eval()
    text = torch.tensor([[0, 1, 2, 0, 1, 1, 2, 2, 0, 1, 2, 0]])
    before = one_call_terms(model, text, 4, ALLOWED)
    for place in range(T):  # a changed token changes its own value and those after it
        changed = text.clone()
        changed[0, place] = (text[0, place] + 1) % V0
        assert not torch.allclose(one_call_terms(model, changed, 4, ALLOWED), before)
    blind = one_call_terms(model, text, 12, ALLOWED)
    assert not torch.allclose(blind, before)


BLOCKS = ('--attention_type=block', '--block_length=[4,16]', '--sampler_order=left_to_right', '--sampler_gate=True',
          '--sampler_context_left=3', '--sampler_context_right=0', '--add_critic_head=False', '--dropout=0.1')


@pytest.mark.parametrize('more', [('--predicts=next',), ('--add_critic_head=True', '--start_critic_iteration=5')])
def test_a_stopped_run_goes_on_exactly(small_corpus, capsys, more):
    options = (*BLOCKS, *more)
    run(*options, '--out_dir=whole')
    run(*options, '--out_dir=parts', '--max_iters=6')
    run(*options, '--out_dir=parts', '--init_from=resume')
    equal_runs(Path('whole'), Path('parts'))
    assert 'one call of 16' in capsys.readouterr().out


@pytest.mark.parametrize('share, name', [(1.0, 'val/one_call'), (0.5, 'val/nelbo')])
def test_the_best_checkpoint_is_the_best_at_what_training_shows(small_corpus, share, name):
    run(*BLOCKS, f'--whole_block_share={share}', '--learning_rate=0.02', '--start_sampler_iteration=0')
    values = [row[name] for row in read_metrics(Path('out') / 'metrics.jsonl') if name in row and row['iteration'] > 0]
    assert load_checkpoint('out/ckpt_best.pt').best_value == min(values)


def test_a_causal_model_begins_as_a_block_model_and_loses_nothing(small_corpus, capsys):
    """At blocks of one, through a fresh head, each token has the causal model's own likelihood. The first token of a
    window is left out: a causal model does not predict it."""
    run('--attention_type=causal', '--add_critic_head=False', '--add_sampler_head=False', '--out_dir=causal')
    causal, text = build_model(load_checkpoint('causal/ckpt_best.pt')), torch.from_numpy(
        small_corpus.tokens('val', 16)[:160].astype('int64')).view(10, 16)
    run(*BLOCKS, '--block_length=[1,4]', '--predicts=next', '--init_from_checkpoint=causal/ckpt_best.pt',
        '--out_dir=block', '--max_iters=1', '--learning_rate=0', '--min_lr=0')
    block = build_model(load_checkpoint('block/ckpt.pt'))
    allowed = allowed_ids(causal.config.vocab_size, small_corpus.vocabulary.base_size)
    scores = causal(text[:, :-1]).logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    expected = -scores.gather(2, text[:, 1:, None]).squeeze(2).sum(1)
    hidden = block.encode_streams(torch.full_like(text, block.config.mask_token_id), text, 1)
    first = block.lm_head(hidden[:, 0]).masked_fill(~allowed, -torch.inf).log_softmax(-1)
    found = one_call_terms(block, text, 1, allowed) * 16 + first.gather(1, text[:, :1]).squeeze(1)
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)
    capsys.readouterr()
    run(*BLOCKS, '--out_dir=own', '--init_from_checkpoint=causal/ckpt_best.pt', '--max_iters=1')
    assert '--predicts=next keeps what it knows' in capsys.readouterr().out


@pytest.mark.parametrize('arguments, words', [
    (('--block_length=[]',), 'block_length is empty'), (('--block_length=5',), 'must divide block_size'),
    (('--block_length=[4,32]',), 'block_length is 32'), (('--block_length_from=[0]',), 'one iteration for each length'),
    (('--block_mask_shares=[0.8,0.2]',), 'two rising numbers'), (('--whole_block_share=1.5',), 'whole_block_share'),
    (('--block_mask_shares=[0.2,0.8]', '--loss_weighting=elbo'), 'a bound over [0, 1] alone'),
    (('--add_critic_head=True', '--start_critic_iteration=6', '--critic_fill=revised'), 'critic of a block model'),
    (('--add_critic_head=True', '--start_critic_iteration=6', '--predicts=next'), 'predicts is next, but a critic'),
    (('--attention_type=bidirectional',), 'leave it out')])
def test_wrong_options_are_named(small_corpus, arguments, words):
    assert words in refused(*BLOCKS, *arguments)
