"""Recorded waves, with a graph that is not one: it computes the recorded wave again at every replay."""

import pytest
import torch

import core.sampling.recorded_waves as recorded_waves
from core.common.drawing import DrawRule, allowed_ids
from core.common.randomness import keyed
from core.sampling.recorded_waves import RecordedWaves, Recording, fill_place, make_place, make_room, take_wave
from helpers.toys import toy_config
from model import GPT
from sample_utils import FillTask, sampler_wavefront_fill


class Again:
    def __init__(self, compute):
        self.compute, self.replays = compute, 0

    def replay(self):
        self.replays += 1
        self.compute()


class OnTheProcessor(RecordedWaves):
    def _record(self, choose, tables, rule, waves, lanes):
        place = make_place(tables, waves, lanes)
        fill_place(place, tables, waves)
        chosen = make_room(take_wave(choose, rule, place, lanes, None), waves, lanes)
        return Recording(Again(lambda: take_wave(choose, rule, place, lanes, chosen)), place, chosen, rule)


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch):
    monkeypatch.setattr(recorded_waves, 'DEVICE', 'cpu')
    with torch.no_grad():
        yield


def model_of(**changes):
    model = GPT(toy_config(add_sampler_head=True, block_size=24, **changes), seed=5).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():  # so that the head says something of its own
        weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def task_of(model, rows, temperature=1.0, share=0.8, seed=0, **changes):
    config, generator = model.config, keyed(seed, 0, 0, rows)
    base = allowed_ids(config.vocab_size, config.mask_token_id)
    tokens = torch.randint(config.mask_token_id, (rows, config.block_size),
                           generator=torch.Generator().manual_seed(seed))
    tokens = tokens.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed + 1)) < share,
                                config.mask_token_id)
    return FillTask(tokens, model.encode(tokens), DrawRule(base, temperature), generator, **changes)


@pytest.mark.parametrize('changes', [
    {}, {'sampler_context': 3}, {'sampler_context_left': 4, 'sampler_context_right': 0, 'sampler_order': 'left_to_right'},
    {'sampler_context': 2, 'sampler_gate': True}, {'sampler_n_embd': 12, 'sampler_residual': False}], ids=str)
@pytest.mark.parametrize('rows, temperature, share', [(1, 1.0, 0.5), (3, 0.7, 0.8), (5, 1.0, 1.1)])
def test_recorded_waves_write_what_the_plain_ones_write(changes, rows, temperature, share):
    model, recorder = model_of(**changes), OnTheProcessor()
    order = model.config.sampler_order
    for seed in range(3):
        task = task_of(model, rows, temperature, share, seed)
        plain, found = (sampler_wavefront_fill(model, task, order, recorder=one) for one in (None, recorder))
        assert torch.equal(found.tokens, plain.tokens) and torch.equal(found.drawn, plain.drawn)
        assert found.statistics == plain.statistics
        torch.testing.assert_close(found.log_probabilities, plain.log_probabilities, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.confidence, plain.confidence, rtol=1e-5, atol=1e-5)
    replays = sum(one.graph.replays for one in recorder._recordings.values())
    assert replays > recorder.recorded > 0


def test_placed_tokens_and_groups_are_scored_alike():
    model, recorder = model_of(sampler_context=2), OnTheProcessor()
    truth = torch.randint(model.config.mask_token_id, (4, 24), generator=torch.Generator().manual_seed(9))
    group = torch.rand(4, 24, generator=torch.Generator().manual_seed(10)) < 0.4
    task = task_of(model, 4, share=1.1, truth=truth, positions=group)
    plain, found = (sampler_wavefront_fill(model, task, recorder=one) for one in (None, recorder))
    assert torch.equal(found.tokens, plain.tokens) and recorder.recorded == 1
    torch.testing.assert_close(found.log_probabilities, plain.log_probabilities, rtol=1e-5, atol=1e-5)


def test_weights_that_change_in_place_are_the_ones_that_draw():
    model, recorder = model_of(), OnTheProcessor()
    task = task_of(model, 4)
    before = sampler_wavefront_fill(model, task, recorder=recorder)
    for weight in model.sampler_head.parameters():
        weight.mul_(-1.5)
    plain, found = (sampler_wavefront_fill(model, task, recorder=one) for one in (None, recorder))
    assert torch.equal(found.tokens, plain.tokens) and not torch.equal(found.tokens, before.tokens)


def test_what_it_has_no_way_for_is_drawn_as_ever():
    model, recorder = model_of(), OnTheProcessor()
    task = task_of(model, 3)
    with torch.enable_grad():
        model.requires_grad_(True)
        assert sampler_wavefront_fill(model, task, recorder=recorder).log_probabilities.requires_grad
    model.requires_grad_(False)
    rule = DrawRule(task.rule.allowed, repetition_penalty=1.3)
    sampler_wavefront_fill(model, FillTask(task.tokens, task.hidden_states, rule, task.generator), recorder=recorder)
    assert recorder.recorded == 0


def test_a_processor_records_nothing(monkeypatch):
    monkeypatch.setattr(recorded_waves, 'DEVICE', 'cuda')
    model, recorder = model_of(), RecordedWaves()
    task = task_of(model, 3)
    plain, found = (sampler_wavefront_fill(model, task, recorder=one) for one in (None, recorder))
    assert torch.equal(found.tokens, plain.tokens) and recorder.recorded == 0 and recorder.works
