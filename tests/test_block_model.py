"""Block attention: blocks read one by one; tiles in place of the dense mask; the cache; the two ends, causal and
bidirectional."""

import dataclasses

import pytest
import torch

from core.common.stream_attention import stream_tiles
from helpers.toys import V0, awake, toy_config
from model import GPT

T, MASK = 12, V0
predicts_both = pytest.mark.parametrize('predicts', ['own', 'next'])


def block_model(*lengths: int, **changes) -> GPT:
    return awake(GPT(toy_config(block_size=T, attention_type='block', block_length=lengths, n_layer=2,
                                **changes))).eval()


def texts(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V0, (rows, T), generator=torch.Generator().manual_seed(seed))


@predicts_both
@pytest.mark.parametrize('b', [1, 2, 3, 4, 6])
def test_a_block_sees_itself_and_the_clean_text_before_it(b, predicts):
    """Each block alone: the clean text before it and the block, read in one plain pass of block-causal attention."""
    model, clean = block_model(b, predicts=predicts), texts(3)
    noisy = torch.where(torch.rand(3, T, generator=torch.Generator().manual_seed(1)) < 0.6, MASK, clean)
    together = model.encode_streams(noisy, clean, b)
    for first in range(0, T, b):
        cache = model.new_cache(3)
        text = torch.cat((clean[:, :first], noisy[:, first:first + b]), dim=1)
        alone = model.encode_blocks(text, b, cache, first)[:, first:]
        assert torch.allclose(alone, together[:, first:first + b], atol=1e-5)
        assert cache.length == first


@predicts_both
def test_rows_of_one_batch_have_their_own_lengths(predicts):
    model, clean = block_model(2, 3, 12, predicts=predicts), texts(3)
    noisy = clean.masked_fill(torch.rand(3, T, generator=torch.Generator().manual_seed(2)) < 0.6, MASK)
    lengths = torch.tensor([2, 3, 12])
    together = model.encode_streams(noisy, clean, lengths)
    for row, b in enumerate(lengths.tolist()):
        alone = model.encode_streams(noisy[row:row + 1], clean[row:row + 1], b)[0]
        assert torch.allclose(together[row], alone, atol=1e-5)


@predicts_both
@pytest.mark.parametrize('b', [4, 12])
def test_picked_positions_are_those_of_the_whole(b, predicts):
    model, clean = block_model(b, predicts=predicts), texts(3)
    noisy = clean.masked_fill(torch.rand(3, T, generator=torch.Generator().manual_seed(3)) < 0.5, MASK)
    positions = (noisy == MASK).flatten().nonzero().squeeze(1)
    whole = model.encode_streams(noisy, clean, b)
    assert torch.allclose(model.encode_streams(noisy, clean, b, positions), whole.flatten(0, 1)[positions], atol=1e-6)
    picked, every = model.encode_all(noisy, positions, clean, b)
    assert torch.allclose(picked, whole.flatten(0, 1)[positions], atol=1e-6)
    assert torch.allclose(every, whole, atol=1e-6) and not every.requires_grad
    if b == T:  # read as one text
        assert torch.allclose(model.encode(noisy), whole, atol=1e-6)
        assert torch.allclose(model.encode(noisy, positions=positions), picked, atol=1e-6)
        assert torch.allclose(model.encode_all(noisy, positions)[1], whole, atol=1e-6)


@pytest.fixture
def fresh_compiler():
    """FlexAttention compiles itself for each kind of input, and torch counts how often."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings('ignore:flex_attention called without')
@pytest.mark.parametrize('b, positions, predicts', [
    (40, 'rotary', 'own'), (40, 'absolute', 'next'), (torch.tensor([1, 5, 160]), 'rotary', 'next'),
    (torch.tensor([1, 5, 160]), 'absolute', 'own')])
def test_tiles_give_what_the_dense_mask_gives(b, positions, predicts, fresh_compiler):
    """On a processor: the forward pass that torch has there, without fused kernels. The rows end inside a tile."""
    length, lengths = 160, [b] if isinstance(b, int) else b.tolist()
    model = awake(GPT(toy_config(block_size=length, attention_type='block', block_length=lengths, n_layer=2,
                                 position_encoding=positions, predicts=predicts))).eval()
    generator = torch.Generator().manual_seed(7)
    clean = torch.randint(0, V0, (3, length), generator=generator)
    noisy = clean.masked_fill(torch.rand(3, length, generator=generator) < 0.6, MASK)
    asked, tiles = (noisy == MASK).flatten().nonzero().squeeze(1), stream_tiles(b, length, clean.device)
    with torch.no_grad():
        whole = model.encode_streams(noisy, clean, b)
        assert torch.allclose(model.encode_streams(noisy, clean, b, tiles=tiles), whole, atol=1e-5)
        found = model.encode_streams(noisy, clean, b, asked, tiles)
        assert torch.allclose(found, whole.flatten(0, 1)[asked], atol=1e-5)
        picked, every = model.encode_all(noisy, asked, clean, b, tiles)
        assert torch.allclose(picked, whole.flatten(0, 1)[asked], atol=1e-5)
        assert torch.allclose(every, whole, atol=1e-5)
        others = model.encode_streams(noisy, clean, b, tiles=stream_tiles(80, length, clean.device))
        assert not torch.allclose(others, whole, atol=0.1)
        with torch.autocast('cpu', torch.bfloat16):
            rough = model.encode_streams(noisy, clean, b)
            assert torch.allclose(model.encode_streams(noisy, clean, b, tiles=tiles), rough, atol=0.1)


@predicts_both
@pytest.mark.parametrize('b', [1, 3, 4])
def test_nothing_leaks(b, predicts):
    """A changed clean token changes nothing in its own block of the masked stream, nor in any before it."""
    model, clean = block_model(b, predicts=predicts), texts(1)
    noisy = torch.full_like(clean, MASK)
    before = model.encode_streams(noisy, clean, b)
    for place in range(T):
        changed = clean.clone()
        changed[0, place] = (clean[0, place] + 1) % V0
        after = model.encode_streams(noisy, changed, b)
        first_after = (place // b + 1) * b
        assert torch.equal(after[:, :first_after], before[:, :first_after])
        assert first_after >= T or not torch.allclose(after[:, first_after:], before[:, first_after:])


def test_one_block_is_the_bidirectional_model_to_the_last_bit():
    model, clean = block_model(T), texts(2)
    plain = GPT(dataclasses.replace(model.config, attention_type='bidirectional', block_length=())).eval()
    plain.load_state_dict(model.state_dict())
    noisy = clean.masked_fill(torch.rand(2, T, generator=torch.Generator().manual_seed(4)) < 0.5, MASK)
    assert torch.equal(model.encode_streams(noisy, clean, T), plain.encode(noisy))


def test_a_state_that_predicts_the_next_position_comes_from_the_one_before():
    """In one block from the same stream; at blocks of one from the causal model's own."""
    model, clean = block_model(1, T, predicts='next'), texts(2)
    own = GPT(dataclasses.replace(model.config, predicts='own')).eval()
    causal = GPT(dataclasses.replace(own.config, attention_type='causal', block_length=())).eval()
    for one in (own, causal):
        one.load_state_dict(model.state_dict())
    noisy = clean.masked_fill(torch.rand(2, T, generator=torch.Generator().manual_seed(8)) < 0.5, MASK)
    found, before = model.encode(noisy), own.encode(noisy)
    assert torch.equal(found[:, 1:], before[:, :-1]) and torch.equal(found[:, 0], before[:, 0])
    masks = torch.full_like(clean, MASK)
    assert torch.allclose(model.encode_streams(masks, clean, 1)[:, 1:], causal.encode(clean)[:, :-1], atol=1e-6)


def test_blocks_of_one_read_text_as_the_causal_model_does():
    model, clean = block_model(1), texts(2)
    causal = GPT(dataclasses.replace(model.config, attention_type='causal', block_length=())).eval()
    causal.load_state_dict(model.state_dict())
    assert torch.allclose(model.encode_blocks(clean, 1, model.new_cache(2), T), causal.encode(clean), atol=1e-5)


@predicts_both
@pytest.mark.parametrize('b', [1, 2, 4])
@pytest.mark.parametrize('positions', ['rotary', 'absolute'])
def test_the_cache_changes_nothing(b, positions, predicts):
    """A finished block travels with the next one in work; what comes out is what two streams say of the same blocks."""
    model, clean = block_model(b, position_encoding=positions, predicts=predicts), texts(2)
    noisy = clean.masked_fill(torch.rand(2, T, generator=torch.Generator().manual_seed(5)) < 0.6, MASK)
    whole, cache = model.encode_streams(noisy, clean, b), model.new_cache(2)
    found = [model.encode_blocks(noisy[:, :b], b, cache, 0)]
    for first in range(b, T, b):
        call = torch.cat((clean[:, first - b:first], noisy[:, first:first + b]), dim=1)
        found.append(model.encode_blocks(call, b, cache, b)[:, b:])
        again = model.encode_blocks(noisy[:, first:first + b], b, cache, 0)  # now it reads the block in work alone
        assert torch.allclose(again, found[-1], atol=1e-5)
    assert torch.allclose(torch.cat(found, dim=1), whole, atol=1e-5)


def test_gradients_of_two_streams_are_those_of_one_pass_for_each_block():
    model, clean = block_model(3).train(), texts(2)
    noisy = clean.masked_fill(torch.rand(2, T, generator=torch.Generator().manual_seed(6)) < 0.7, MASK)
    weight = torch.randn(2, T, model.config.n_embd, generator=torch.Generator().manual_seed(7))
    (model.encode_streams(noisy, clean, 3) * weight).sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                if parameter.grad is not None}
    model.zero_grad()
    for first in range(0, T, 3):
        text = torch.cat((clean[:, :first], noisy[:, first:first + 3]), dim=1)
        block = torch.arange(first + 3) // 3
        hidden, _ = model._read(text, model._places(0, first + 3), (block[:, None] >= block)[None, None], None, None)
        (hidden[:, first:] * weight[:, first:first + 3]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, together[name], atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize('changes, words', [
    ({'block_length': ()}, 'block_length is empty'), ({'block_length': (5,)}, 'block_length is 5, but must divide'),
    ({'block_length': (0,)}, 'block_length is 0'), ({'block_length': (24,)}, 'block_length is 24'),
    ({'block_length': (2, 2)}, 'twice'), ({'block_length': (2,), 'mask_token_id': None}, 'requires mask_token_id'),
    ({'attention_type': 'causal', 'block_length': (2,)}, 'leave it out'),
    ({'attention_type': 'causal', 'block_length': (), 'predicts': 'next'}, 'predicts is next, but attention_type'),
    ({'block_length': (2,), 'predicts': 'next', 'add_critic_head': True}, 'predicts is next, but a critic'),
    ({'block_length': (2,), 'predicts': 'auto'}, "predicts is 'auto', but must be one of own, next")])
def test_wrong_lengths_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        toy_config(**{'block_size': T, 'attention_type': 'block', **changes})
