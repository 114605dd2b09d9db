"""The animation on a small terminal made of characters, on a pipe, and on streams of few characters."""

import io
import re
from collections import namedtuple

import pytest
import torch

from core.sampling.animation import TerminalAnimation
from core.sampling.trace import TraceStep

LETTERS, MASK = ['a', 'b', 'c', '\n', '\x1b', '漢', 'é'], 7
SIZE = namedtuple('Size', 'columns lines')


class Screen(io.StringIO):
    """A terminal: text with columns, cursor up, carriage return, erasures and styles; `styles` of each written sign."""

    encoding = 'utf-8'

    def __init__(self):
        super().__init__()
        self.rows, self.row, self.column, self.style, self.cursor_shown = [[]], 0, 0, '', True

    def isatty(self):
        return True

    def write(self, text):
        for code, sign in re.findall(r'\x1b\[([?\d;]*[A-Za-z])|(.)', text, re.DOTALL):
            if code:
                self._control(code)
            elif sign == '\n':
                self.row, self.column = self.row + 1, 0
                self.rows += [[]] * (self.row == len(self.rows))
            elif sign == '\r':
                self.column = 0
            else:
                assert sign.isprintable()
                row = self.rows[self.row] + [(' ', '')] * (self.column - len(self.rows[self.row]))
                self.rows[self.row] = row[:self.column] + [(sign, self.style)] + row[self.column + 1:]
                self.column += 1
        return len(text)

    def _control(self, code):
        if code.endswith('A'):
            self.row -= int(code[:-1])
            assert self.row >= 0
        elif code in ('K', 'J'):
            self.rows[self.row] = self.rows[self.row][:self.column]
            self.rows = self.rows[:self.row + 1] if code == 'J' else self.rows
        elif code in ('?25l', '?25h'):
            self.cursor_shown = code == '?25h'
        else:
            assert code.endswith('m')
            self.style = '' if code == '0m' else code[:-1]

    def lines(self):
        return [''.join(sign for sign, _ in row) for row in self.rows]

    def style_of(self, sign):
        """Of the text's first line; the headline is above it."""
        return {style for one, style in self.rows[1] if one == sign}


def step(tokens, event='predict', changed=(), number=0, start=0, sample=0, window=0):
    tokens = torch.tensor([tokens, [MASK] * len(tokens)])
    marks = torch.zeros(tokens.shape, dtype=torch.bool)
    marks[0, list(changed)] = True
    return TraceStep(window, start, number, 9, event, torch.tensor([sample, sample + 1]), tokens, marks,
                     torch.zeros(tokens.shape, dtype=torch.float64))


def animation(stream, protected=(), length=12):
    known = torch.zeros(2, length, dtype=torch.bool)
    known[:, list(protected)] = True
    return TerminalAnimation(lambda ids: ''.join(LETTERS[token] for token in ids), MASK, known, stream, 0.0)


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """The size of the terminal, to be changed by a test."""
    sizes = [SIZE(90, 10)]
    monkeypatch.setattr('core.sampling.animation.shutil.get_terminal_size', lambda: sizes[-1])
    monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setenv('TERM', 'xterm')
    return sizes


def test_each_step_replaces_the_one_before():
    screen = Screen()
    screen.write('before\n')
    with animation(screen, protected=[0]) as animate:
        assert not screen.cursor_shown
        animate(step([0, MASK, MASK, MASK], 'start'))
        assert screen.lines() == ['before', 'sample 0, block 1, step 1 of 9, start, 75% masked', 'a░░░', '']
        animate(step([0, 1, 2, MASK], 'predict', [1, 2], 3))
        assert screen.lines()[1:] == ['sample 0, block 1, step 4 of 9, 2 revealed, 25% masked', 'abc░', '']
        animate(step([0, MASK, 2, MASK], 'remask', [1], 3))
        assert screen.lines()[2:] == ['a▒c░', '']
    assert screen.cursor_shown and screen.lines()[0] == 'before' and len(screen.rows) == 4


def test_the_headline_fits(terminal):
    terminal.append(SIZE(30, 10))
    screen = Screen()
    animation(screen)(step([0, 1, MASK, MASK], 'predict', [0, 1], 3, window=1))
    assert screen.lines()[0] == 'sample 0, block 2, step 4 of.'


@pytest.mark.parametrize('colour', [True, False])
def test_kinds_differ_by_more_than_colour(monkeypatch, colour):
    if not colour:
        monkeypatch.setenv('NO_COLOR', '1')
    screen = Screen()
    animate = animation(screen, protected=[0])
    animate(step([0, 1, 2, MASK], 'predict', [1]))
    (protected,), (revealed,), (settled,), (masked,) = map(screen.style_of, 'abc░')
    animate(step([0, MASK, 2, MASK], 'remask', [1]))
    assert screen.lines()[1] == 'a▒c░'  # masked and remasked differ by their signs
    looks = [re.sub(r';?3\d$', '', style) for style in (protected, revealed, settled, masked)]
    assert len(set(looks)) == 4
    assert (looks != [protected, revealed, settled, masked]) == colour


def test_lines_wrap_at_the_width_and_wide_signs_count_twice(terminal):
    terminal.append(SIZE(6, 20))
    screen = Screen()
    animation(screen)(step([0, 1, 2, 0, 1, 2, 0]))
    assert screen.lines()[1:] == ['abcab', 'ca', '']
    screen = Screen()
    animation(screen)(step([5, 5, 5, 0]))
    assert screen.lines()[1:] == ['漢漢', '漢a', '']


def test_a_tall_text_stays_on_the_screen_where_it_changes(terminal):
    terminal.append(SIZE(4, 5))
    screen = Screen()
    animate = animation(screen)
    animate(step([0] * 9 + [1] * 3, 'predict', [0]))
    assert screen.lines()[1:] == ['aaa', 'aaa', 'aaa', '']
    animate(step([0] * 9 + [1] * 3, 'predict', [10]))
    assert screen.lines()[1:] == ['bbb', '']


def test_control_characters_stay_harmless():
    screen = Screen()
    animation(screen)(step([0, 3, 4, 1]))
    assert screen.lines()[1] == 'a↵·b'


def test_clear_makes_room_for_other_lines():
    screen = Screen()
    animate = animation(screen)
    animate(step([0, MASK]))
    animate.clear()
    animate.clear()
    screen.write('a word between\n')
    animate(step([0, 1]))
    assert screen.lines()[0] == 'a word between' and screen.lines()[2:] == ['ab', '']


class Pipe(io.StringIO):
    def __init__(self, encoding):
        super().__init__()
        self.codec = encoding

    @property
    def encoding(self):
        return self.codec


@pytest.mark.parametrize('encoding, expected', [('utf-8', 'a░é↵·漢▒'), ('ascii', 'a_?/??~'), ('latin-1', 'a_é/??~')])
def test_plain_lines_without_a_terminal(encoding, expected):
    pipe = Pipe(encoding)
    with animation(pipe, protected=[0]) as animate:
        animate(step([0, MASK, 6, 3, 4, 5, MASK], 'remask', [6], 2))
        animate(step([0, MASK, 6, 3, 4, 5, 0], 'predict', [6], 3))
        animate.clear()
    lines = pipe.getvalue().splitlines()
    assert lines == [f'sample 0, block 1, step 3 of 9, 1 remasked, 29% masked: {expected}',
                     f'sample 0, block 1, step 4 of 9, 1 revealed, 14% masked: {expected[:-1]}a']
    assert '\x1b' not in pipe.getvalue()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv('TERM', 'dumb')
    screen = Screen()
    animation(screen)(step([0, 1]))
    assert screen.lines() == ['sample 0, block 1, step 1 of 9, 0 revealed, 0% masked: ab', '']


def test_protected_is_of_the_sample_and_window():
    screen = Screen()
    animate = animation(screen, protected=[5])
    animate(step([0, 1, 2], start=4))
    assert screen.style_of('b') == {'4;34'} and screen.style_of('a') == screen.style_of('c') == {''}


def test_the_cursor_comes_back_after_a_failure():
    screen = Screen()
    with pytest.raises(KeyboardInterrupt), animation(screen) as animate:
        animate(step([0, 1]))
        raise KeyboardInterrupt
    assert screen.cursor_shown


def test_frames_keep_their_pace(monkeypatch):
    clock, slept = [100.0], []
    monkeypatch.setattr('core.sampling.animation.time.perf_counter', lambda: clock[0])

    def sleep(seconds):
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr('core.sampling.animation.time.sleep', sleep)
    animate = TerminalAnimation(lambda ids: 'a', MASK, torch.zeros(2, 2, dtype=torch.bool), Screen(), 0.5)
    for passed in (0.0, 0.25, 2.0):
        clock[0] += passed
        animate(step([0, 1]))
    assert slept == pytest.approx([0.0, 0.25, 0.0]) and animate.seconds == pytest.approx(0.25)
