"""The picture of a run: its frames are the trace's steps, drawn so that no two kinds or texts look alike."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configurator import configure
from core.common.errors import UserError
from core.sampling import picture
from core.sampling.options import SampleConfig
from core.sampling.outputs import output_problems
from core.sampling.picture import (CELL, COLUMNS, FRAMES, LARGEST, LOOKS, MARGIN, Moment, Painter, encoded, moments,
                                   places, write_picture)
from core.sampling.trace import Trace, TraceStep
from helpers.sampling import VOCABULARY, sample, write_checkpoint

MASK = VOCABULARY.mask_token_id
BLOCKS = {'attention_type': 'block', 'block_length': (4,), 'add_sampler_head': True, 'sampler_order': 'left_to_right'}
RUNS = {
    'maskgit': ({}, ('--sampling_policy=maskgit', '--iterations=5')),
    'remask': ({}, ('--iterations=4', '--start_text=abc', '--seed_placement=random')),
    'remdm': ({}, ('--sampling_policy=remdm_cap', '--iterations=6', '--remdm_eta=0.4')),
    'windows': ({}, ('--iterations=3', '--sequence_length=40')),
    'infill': ({}, ('--iterations=3', '--infill_text=ab__cd____',)),
    'multinomial': ({}, ('--sampling_method=multinomial', '--iterations=4')),
    'standard': ({}, ('--sampling_method=standard',)),
    'causal': ({'attention_type': 'causal'}, ('--sampling_method=standard', '--start_text=ab')),
    'blocks': (BLOCKS, ('--sequence_length=24', '--iterations=2', '--start_text=abcde')),
}


def run_of(folder, name):
    changes, options = RUNS[name]
    write_checkpoint(folder / 'ckpt_best.pt', **changes)
    result, _ = sample(folder, '--num_samples=2', f'--save_json={folder}/run.json', '--quality_metric=none', *options)
    return result


def states_of(trace):
    """The first text's tokens at the start and after each step with its remasking, from the trace's own tokens."""
    steps = [(step, step.tokens[0].tolist()) for step in trace.steps if 0 in step.rows.tolist()]
    length = trace.protected.size(1)
    state = [None] * length
    for step, tokens in steps:
        for place, token in enumerate(tokens):
            if trace.protected[0, step.start + place]:
                state[step.start + place] = token
    states = [state]
    for number, (step, tokens) in enumerate(steps):
        following = steps[number + 1][0] if number + 1 < len(steps) else None
        state = state.copy()
        causal = trace.settings['sampling_method'] == 'standard'
        for place, token in enumerate(tokens):
            if not causal or step.changed[0, place]:
                state[step.start + place] = None if token == MASK else token
        if step.event != 'start' and not (following is not None and following.event == 'remask'):
            states.append(state)
    return states


@pytest.mark.parametrize('name', RUNS)
def test_the_frames_are_the_trace(tmp_path, name):
    """Kinds and texts of every moment, worked out from the tokens that the trace holds after each step."""
    result = run_of(tmp_path, name)
    states, decode = states_of(result.trace), VOCABULARY.decode
    shown = moments(result.trace, decode, 10_000)
    assert len(shown) == len(states) + 1 > 3
    for moment, before, now in zip(shown, [states[0], *states], states):
        for position, (kind, text) in enumerate(zip(moment.kinds, moment.texts)):
            old, token = before[position], now[position]
            if result.trace.protected[0, position]:
                assert (kind, text) == ('protected', decode([token]))
            elif token is None:
                assert (kind, text) == (('masked', '') if old is None else ('remasked', decode([old])))
            else:
                assert text == decode([token]) and kind in ('revealed', 'settled')
                assert kind == 'revealed' or token == old
                assert kind == 'settled' or name == 'multinomial' or token != old or old is not None
    assert set(shown[0].kinds) <= {'masked', 'protected'} and shown[0].caption == 'start'
    assert set(shown[-1].kinds) <= {'settled', 'protected'} and ''.join(shown[-1].texts) == result.texts[0]
    assert shown[-2].texts == shown[-1].texts


def test_a_step_that_reveals_is_new_and_one_that_takes_back_is_struck():
    """A token drawn and taken back in one step was never shown; one that was shown is struck, once."""
    def step(number, event, tokens, changed):
        return TraceStep(0, 0, number, 3, event, torch.tensor([0]), torch.tensor([tokens]),
                         torch.tensor([[position in changed for position in range(3)]]),
                         torch.zeros(1, 3, dtype=torch.float64))

    trace = Trace({}, torch.zeros(1, 3, dtype=torch.bool))
    for args in ((0, 'start', [MASK] * 3, ()), (0, 'predict', [2, 3, 4], (0, 1, 2)), (0, 'remask', [2, MASK, MASK], (1, 2)),
                 (1, 'predict', [2, 5, 6], (1, 2)), (1, 'remask', [MASK, 5, 6], (0,)), (2, 'predict', [7, 5, 6], (0,))):
        trace.add(step(*args))
    assert [moment.kinds for moment in moments(trace, VOCABULARY.decode, 99)] == [
        ['masked'] * 3, ['revealed', 'masked', 'masked'], ['remasked', 'revealed', 'revealed'],
        ['revealed', 'settled', 'settled'], ['settled'] * 3]
    assert [moment.caption for moment in moments(trace, VOCABULARY.decode, 99)] == [
        'start', 'step 1 of 3', 'step 2 of 3', 'step 3 of 3', 'finished']
    fewer = moments(trace, VOCABULARY.decode, 4)  # step 1 is left out: what it drew is new in the next one
    assert [moment.caption for moment in fewer] == ['start', 'step 2 of 3', 'step 3 of 3', 'finished']
    assert fewer[1].kinds == ['masked', 'revealed', 'revealed']


def cells_of(image, painter, moment):
    """(width, kind, text) and pixels of each position of a frame."""
    for place, kind, text in zip(painter.places, moment.kinds, moment.texts):
        left, top = MARGIN + place.column * CELL[0], MARGIN + place.row * CELL[1]
        crop = image.crop((left, top, left + place.width * CELL[0], top + CELL[1]))
        yield (place.width, kind, text), crop.tobytes()


def test_the_file_shows_the_frames(tmp_path):
    """In the file itself: equal cells are drawn alike, unequal ones never, in all frames; first masks, last the text."""
    write_checkpoint(tmp_path / 'ckpt_best.pt', block_size=128)
    result, said = sample(tmp_path, '--num_samples=1', '--sampling_policy=remdm_cap', '--iterations=20', '--start_text=had',
                          '--remdm_eta=0.3', f'--save_gif={tmp_path}/run.gif', f'--save_json={tmp_path}/run.json')
    assert f'picture written to {tmp_path}/run.gif' in said and '.gif,' not in said
    shown = moments(result.trace, VOCABULARY.decode, FRAMES)
    painter = Painter(shown)
    assert {kind for moment in shown for kind in moment.kinds} == set(LOOKS)
    looks, cells = {}, {}
    with Image.open(tmp_path / 'run.gif') as file:
        assert file.n_frames == len(shown) and file.info['loop'] == 0
        for number, moment in enumerate(shown):
            file.seek(number)
            assert file.info['duration'] >= 60
            for key, pixels in cells_of(file.convert('RGB'), painter, moment):
                assert looks.setdefault(pixels, key) == key and cells.setdefault(key, pixels) == pixels


def test_kinds_differ_without_colour():
    """In shades of grey with one ground for all, no two kinds of one letter look alike."""
    kinds = list(LOOKS)
    moment = Moment('', kinds, ['a'] * len(kinds))
    painter = Painter([moment])
    image = painter.frame(moment).convert('L')
    forms = []
    for _, pixels in cells_of(image, painter, moment):
        ground = max(pixels, key=pixels.count)
        forms.append([2 * (ground - value) > ground - min(pixels) for value in pixels])
    assert len(forms) == len(kinds)
    assert all(sum(left != right for left, right in zip(one, other)) >= 8  # of a line through a cell, some are the letter's
               for number, one in enumerate(forms) for other in forms[:number])


@pytest.mark.parametrize('length', [128, 512])
def test_a_busy_run_stays_small(length):
    """The most that can change: all positions at every step of a long run."""
    tokens = torch.randint(VOCABULARY.base_size, (200, length), generator=torch.Generator().manual_seed(3))
    trace = Trace({}, torch.zeros(1, length, dtype=torch.bool))
    everything, zeros = torch.ones(1, length, dtype=torch.bool), torch.zeros(1, length, dtype=torch.float64)
    for number, row in enumerate(tokens):
        trace.add(TraceStep(0, 0, number, 200, 'predict', torch.tensor([0]), row[None], everything, zeros))
    data, _ = picture.moving_picture(trace, VOCABULARY.decode)
    assert len(data) <= LARGEST
    with Image.open(io.BytesIO(data)) as file:
        assert file.n_frames >= FRAMES // 4


def test_fewer_frames_where_they_are_too_large(monkeypatch, tmp_path):
    result = run_of(tmp_path, 'causal')
    whole, _ = picture.moving_picture(result.trace, VOCABULARY.decode)
    monkeypatch.setattr(picture, 'LARGEST', len(whole) - 1)
    monkeypatch.setattr(picture, 'FRAMES', 16)
    less, _ = picture.moving_picture(result.trace, VOCABULARY.decode)
    with Image.open(io.BytesIO(less)) as file:
        assert len(less) < len(whole) and file.n_frames <= 16


def test_the_strip_has_the_moments_below_each_other(tmp_path):
    result = run_of(tmp_path, 'blocks')
    write_picture(result.trace, VOCABULARY.decode, tmp_path / 'strip.PNG')
    shown = moments(result.trace, VOCABULARY.decode, 6)
    del shown[-2]
    painter = Painter(shown)
    assert len(shown) == 5 and shown[-1].caption == 'finished' and shown[0].caption == 'start' and shown[2].caption.startswith('block ')
    with Image.open(tmp_path / 'strip.PNG') as file:
        assert file.format == 'PNG' and file.width == painter.width
        part = painter.height + CELL[1] + MARGIN
        for number, moment in enumerate(shown):
            crop = file.crop((0, number * part, file.width, MARGIN + (number + 1) * part - MARGIN // 2))
            alone = painter.frame(moment).crop((0, 0, file.width, MARGIN + part - MARGIN // 2))
            assert list(cells_of(crop, painter, moment)) == list(cells_of(alone, painter, moment))


def test_blocks_come_from_left_to_right(tmp_path):
    """In the picture of a block model nothing is written after the block in work."""
    shown = moments(run_of(tmp_path, 'blocks').trace, VOCABULARY.decode, 10_000)
    assert len({moment.caption.split(',')[0] for moment in shown}) > 4
    for moment in shown:
        written = [position for position, kind in enumerate(moment.kinds) if kind != 'masked']
        assert not written or len(written) >= written[-1] // 4 * 4


def test_a_text_too_long_for_the_picture_is_cut_and_that_is_told(tmp_path):
    write_checkpoint(tmp_path / 'ckpt_best.pt')
    _, said = sample(tmp_path, '--num_samples=1', '--sequence_length=3000', '--iterations=1', '--quality_metric=none',
                     f'--save_gif={tmp_path}/run.gif')
    assert 'picture written' in said and 'without the last' in said


@pytest.mark.parametrize('name', ['run.jpg', 'run', 'gif'])
def test_another_ending_is_refused(tmp_path, name):
    config = configure(SampleConfig, [f'--save_gif={tmp_path}/{name}']).config
    found, = output_problems(config)
    assert found.startswith(f"save_gif is '{tmp_path}/{name}', but must end in .gif") and '.png' in found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_in_the_end(tmp_path):
    result = run_of(tmp_path, 'maskgit')
    with pytest.raises(UserError, match='gone'):
        write_picture(result.trace, VOCABULARY.decode, tmp_path / 'gone' / 'run.gif')


PIECES = st.lists(st.one_of(st.text(alphabet='ab \n\t', min_size=0, max_size=9), st.text(max_size=90)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(PIECES)
def test_places_do_not_overlap_and_keep_the_order(texts):
    found = places(texts)
    assert len(found) == len(texts)
    assert all(place.width >= 1 and place.column + place.width <= COLUMNS for place in found)
    for text, one, after in zip(texts, found, found[1:]):
        assert (after.row, after.column) >= (one.row, one.column + one.width) if '\n' not in text else \
            (after.row >= one.row + text.count('\n'))


def test_words_stay_on_one_line():
    texts = list('word ' * 30)
    found = places(texts)
    for start in range(0, 150, 5):
        assert len({place.row for place in found[start:start + 4]}) == 1
    assert places(['a', ' b', ' c' * 20])[2].column == 3 and places(['x' * 70])[0].width == COLUMNS


def test_any_text_can_be_drawn():
    texts = ['<b>', '\x1b[2J', '\u202e', '漢字', '\ud800', '\ufffd', '']
    moment = Moment('', ['settled'] * len(texts), texts)
    assert len(encoded([Painter([moment]).frame(moment)] * 2)) > 100


def test_a_run_without_steps_is_a_picture(tmp_path):
    trace = Trace({}, torch.ones(1, 2, dtype=torch.bool))
    write_picture(trace, VOCABULARY.decode, tmp_path / 'run.gif')
    with Image.open(tmp_path / 'run.gif') as file:
        assert file.n_frames >= 1


def test_a_vocabulary_of_byte_pairs_keeps_its_places():
    """A token longer than the one that replaces it is cut at its place, so that nothing moves."""
    moments_shown = [Moment('', ['remasked', 'settled'], [' something', 'b']), Moment('', ['settled'] * 2, [' a', 'b'])]
    painter = Painter(moments_shown)
    first, last = (painter.frame(moment) for moment in moments_shown)
    assert painter.places[0].width == 2
    box = (MARGIN + 2 * CELL[0], MARGIN, MARGIN + 10 * CELL[0], MARGIN + CELL[1])
    assert first.crop(box).tobytes() == last.crop(box).tobytes()
