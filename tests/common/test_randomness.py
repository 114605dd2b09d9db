"""The counter-based generator against its published test vectors, and its independence of the batch."""

import torch
from hypothesis import given, settings, strategies as st

from core.common.randomness import Purpose, RowRandom, keyed, philox4x32


def test_philox_known_answers():
    """The known answers that Salmon et al. publish with Philox4x32-10 (Random123's kat_vectors)."""
    cases = [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for counter, key, expected in cases:
        assert philox4x32(torch.tensor(counter), key).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2 ** 64 - 1), iteration=st.integers(0, 2 ** 32 - 1), first=st.integers(0, 2 ** 31),
       count=st.integers(1, 9), width=st.integers(1, 9))
def test_a_row_does_not_depend_on_its_batch(seed, iteration, first, count, width):
    together = keyed(seed, iteration, first, count).uniform(Purpose.MASK, width + 3)
    for row in range(count):
        alone = keyed(seed, iteration, first + row, 1).uniform(Purpose.MASK, width)
        assert torch.equal(together[row, :width], alone[0])
    assert 0 < together.min() and together.max() < 1


def test_every_part_of_the_key_changes_the_numbers():
    base = keyed(1, 2, 3, 1).uniform(Purpose.MASK, 8)
    others = [keyed(9, 2, 3, 1).uniform(Purpose.MASK, 8), keyed(1 + 2 ** 32, 2, 3, 1).uniform(Purpose.MASK, 8),
              keyed(1, 9, 3, 1).uniform(Purpose.MASK, 8), keyed(1, 2, 9, 1).uniform(Purpose.MASK, 8),
              keyed(1, 2, 3, 1).uniform(Purpose.TIME, 8), keyed(1, 2, 3, 1).uniform(Purpose.MASK, 8, stream=1)]
    for other in others:
        assert not torch.isclose(base, other).any()


def test_uniform_by_chi_square():
    """65,536 numbers in 64 cells; the 99.99 % point of chi-square with 63 degrees of freedom is 112.3."""
    numbers = keyed(7, 0, 0, 256).uniform(Purpose.TOKEN, 256).flatten()
    counts = torch.histc(numbers, bins=64, min=0, max=1)
    statistic = ((counts - 1024) ** 2 / 1024).sum()
    assert 25 < statistic < 112.3
    assert abs(torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]) < 0.015


def test_derived_seed_is_stable_and_distinct():
    seeds = {RowRandom(5, i, torch.tensor([r])).derived_seed(Purpose.DROPOUT) for i in range(20) for r in range(20)}
    assert len(seeds) == 400
    assert keyed(5, 3, 4, 2).derived_seed(Purpose.DROPOUT) == keyed(5, 3, 4, 7).derived_seed(Purpose.DROPOUT)
