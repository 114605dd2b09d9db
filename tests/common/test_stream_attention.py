"""Who sees whom in two streams: the dense mask against a definition by loops, tiles against the dense mask, and which
steps read which."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from core.common.stream_attention import block_attention_mask, block_sees, stream_tiles, tiles_pay

CPU, GPU = torch.device('cpu'), torch.device('cuda')


@given(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_mask_is_what_the_definition_says(length, block_lengths):
    mask = block_attention_mask(torch.tensor(block_lengths), length, CPU)
    assert mask.shape == (len(block_lengths), 1, 2 * length, 2 * length)
    for row, b in enumerate(block_lengths):
        for query in range(2 * length):
            for key in range(2 * length):
                noisy_query, noisy_key = query < length, key < length
                own, other = query % length // b, key % length // b
                if noisy_query:
                    sees = own == other if noisy_key else other < own
                else:
                    sees = not noisy_key and other <= own
                assert mask[row, 0, query, key] == sees, (b, query, key)


@given(st.integers(1, 40), st.lists(st.integers(1, 45), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_one_pair_sees_what_the_dense_mask_says(length, block_lengths):
    mask = block_attention_mask(torch.tensor(block_lengths), length, CPU)
    found = create_mask(block_sees(torch.tensor(block_lengths), length), len(block_lengths), 1, 2 * length, 2 * length,
                        CPU)
    assert torch.equal(found, mask)
    for row, b in enumerate(block_lengths):
        assert torch.equal(create_mask(block_sees(b, length), 1, 1, 2 * length, 2 * length, CPU)[0], mask[row])


@pytest.mark.parametrize('block_length', [5, 96, torch.tensor([1, 64, 130])])
@pytest.mark.parametrize('length', [130, 256])
def test_a_tile_is_read_where_a_pair_in_it_is_seen_and_only_there(length, block_length):
    mask = block_attention_mask(block_length, length, CPU).float()  # [B, 1, 2T, 2T]
    for tiles, queries in zip(stream_tiles(block_length, length, CPU), (2 * length, length)):
        assert tiles.shape[2:] == (queries, 2 * length) and tiles.BLOCK_SIZE == (128, 128)
        seen = torch.nn.functional.max_pool2d(mask[:, :, :queries], 128, ceil_mode=True)
        assert torch.equal(tiles.to_dense().float(), seen)
        full = -torch.nn.functional.max_pool2d(-mask[:, :, :queries], 128, ceil_mode=True)
        assert torch.all(tiles.full_kv_num_blocks <= full.sum(-1))


def test_long_rows_skip_nearly_three_quarters_of_the_tiles():
    tiles = stream_tiles(8, 1024, CPU)
    assert tiles.both.sparsity() > 65 and tiles.noisy.sparsity() > 65


def test_tiles_of_one_length_are_made_once_and_those_of_rows_for_each_batch():
    assert stream_tiles(6, 24, CPU) is stream_tiles(6, 24, CPU)
    assert stream_tiles(6, 24, CPU) is not stream_tiles(6, 12, CPU) is not stream_tiles(4, 12, CPU)
    rows = torch.tensor([1, 12])
    assert stream_tiles(rows, 12, CPU) is not stream_tiles(rows, 12, CPU)  # the rows may hold other lengths by then


@pytest.mark.parametrize('device, length, head_width, dropout, pays', [
    (GPU, 1024, 64, 0.0, True), (torch.device('cuda:1'), 4096, 16, 0.0, True), (GPU, 1023, 64, 0.0, False),
    (GPU, 256, 64, 0.0, False), (GPU, 1024, 8, 0.0, False), (GPU, 1024, 64, 0.1, False), (CPU, 1024, 64, 0.0, False),
    (torch.device('mps'), 1024, 64, 0.0, False)])
def test_tiles_pay_for_long_rows_on_a_cuda_gpu_alone(device, length, head_width, dropout, pays):
    assert tiles_pay(device, length, head_width, dropout) is pays


@pytest.mark.filterwarnings('ignore:flex_attention called without')
@pytest.mark.parametrize('queries', [24, 12])
def test_queries_and_keys_may_be_more_exact_than_values(queries):
    """As autocast leaves them on a GPU, which normalises in float32; the values come from a product in bfloat16."""
    torch.compiler.reset()
    query, key, value = torch.randn(3, 2, 3, 24, 8, generator=torch.Generator().manual_seed(1))
    query, mask = query[:, :, :queries], block_attention_mask(4, 12, CPU)[:, :, :queries]
    found = stream_tiles(4, 12, CPU).attend(query, key, value.bfloat16())
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert found.dtype is torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.05)
