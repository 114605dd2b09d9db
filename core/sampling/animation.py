"""The text condensing in the terminal while it is generated.

On a terminal one block of lines is redrawn in place; elsewhere each step is a plain line. Positions keep their places:
a line break among the tokens is shown as a sign. Masked, just revealed, remasked and protected positions differ by
sign or by underline and reverse video as well as by colour, which the environment variable NO_COLOR turns off.
"""

import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import NamedTuple, TextIO

from torch import Tensor

from core.common.printing import escaped, silence
from core.sampling.trace import TraceStep

SECONDS_PER_FRAME = 0.05  # the least, so that the eye can follow a fast model
COLUMNS_AT_MOST = 100
_STYLES = {'masked': ('2', ''), 'revealed': ('1;7', '32'), 'remasked': ('4', '33'), 'protected': ('4', '34'),
           'settled': ('', '')}  # without colour, and the colour
_HIDE_CURSOR, _SHOW_CURSOR = '\x1b[?25l', '\x1b[?25h'


class _Signs(NamedTuple):
    """What stands for a masked position, one remasked just now, a line break, and any other control character."""

    masked: str
    remasked: str
    line_break: str
    control: str


_UNICODE_SIGNS, _ASCII_SIGNS = _Signs('░', '▒', '↵', '·'), _Signs('_', '~', '/', '?')


class TerminalAnimation:
    """A `Watch` that shows the first sample of each batch; a context manager that gives the cursor back.

    protected bool [samples, L]; stream: standard output by default; seconds: the time that showing has taken so far.
    Call `clear` before other lines are printed; the next step is drawn below them.
    """

    def __init__(self, decode: Callable[[list[int]], str], mask_token_id: int, protected: Tensor,
                 stream: TextIO | None = None, seconds_per_frame: float = SECONDS_PER_FRAME) -> None:
        self._decode, self._mask_token_id, self._protected = decode, mask_token_id, protected
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty() and os.environ.get('TERM') != 'dumb'
        self._colour = 'NO_COLOR' not in os.environ
        self._signs = _UNICODE_SIGNS if self._encodes(''.join(_UNICODE_SIGNS)) else _ASCII_SIGNS
        self._seconds_per_frame, self._shown_at = seconds_per_frame, -seconds_per_frame
        self._first = 0  # the sample that the first row of `protected` is
        self._lines = 0  # on the screen now
        self.seconds = 0.0

    def __enter__(self) -> 'TerminalAnimation':
        if self._live:
            self._write(_HIDE_CURSOR)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._write(_SHOW_CURSOR)

    def __call__(self, step: TraceStep) -> None:
        began = time.perf_counter()
        if self._live:
            time.sleep(max(0.0, self._shown_at + self._seconds_per_frame - began))
            self._redraw(step)
            self._shown_at = time.perf_counter()
        else:
            text = ''.join(sign for sign, _ in self._cells(step))
            self._write(f'{self._headline(step)}: {text}\n')
        self.seconds += time.perf_counter() - began

    def show_rows(self, first: int, protected: Tensor) -> None:
        """From now on the samples from number `first` on are shown, with protected bool [B, L]."""
        self._first, self._protected = first, protected

    def clear(self) -> None:
        """Take the drawn lines off the screen."""
        if self._lines:
            self._write(f'\x1b[{self._lines}A\r\x1b[J')
            self._lines = 0

    def _redraw(self, step: TraceStep) -> None:
        columns, rows = shutil.get_terminal_size()
        width, room = max(2, min(columns - 1, COLUMNS_AT_MOST)), max(1, rows - 2)
        lines, first_changed = self._wrap(self._cells(step), width)
        page = first_changed // room * room  # a text taller than the screen is shown where it changes
        shown = [_clipped(self._headline(step), width), *lines[page:page + room]]
        up = f'\x1b[{self._lines}A\r' if self._lines else ''
        # each line is overwritten and its rest erased, which flickers less than erasing all first
        self._write(up + ''.join(f'{line}\x1b[K\n' for line in shown) + '\x1b[J')
        self._lines = len(shown)

    def _headline(self, step: TraceStep) -> str:
        masked = (step.tokens[0] == self._mask_token_id).float().mean()
        events = {'start': 'start', 'predict': f'{int(step.changed[0].sum())} revealed',
                  'remask': f'{int(step.changed[0].sum())} remasked'}
        return (f'sample {int(step.rows[0])}, block {step.window + 1}, step {step.step + 1} of {step.steps}, '
                f'{events[step.event]}, {masked:.0%} masked')

    def _cells(self, step: TraceStep) -> list[tuple[str, str]]:
        """Sign and kind of each position of the window."""
        protected = self._protected[int(step.rows[0]) - self._first, step.start:step.start + step.tokens.size(1)]
        cells = []
        for token, changed, fixed in zip(step.tokens[0].tolist(), step.changed[0].tolist(), protected.tolist()):
            if token == self._mask_token_id:
                remasked = changed and step.event == 'remask'
                cells.append((self._signs.remasked, 'remasked') if remasked else (self._signs.masked, 'masked'))
            else:
                kind = 'protected' if fixed else 'revealed' if changed else 'settled'
                cells.append((self._printable(self._decode([token])), kind))
        return cells

    def _printable(self, text: str) -> str:
        """No character that could move the cursor, and none that the stream cannot write."""
        signs = escaped(text, self._signs.control)
        signs = signs.replace('\n', self._signs.line_break).replace('\t', self._signs.control)
        return signs if self._encodes(signs) else signs.encode('ascii', 'replace').decode()

    def _wrap(self, cells: list[tuple[str, str]], width: int) -> tuple[list[str], int]:
        """Lines of at most `width` columns with their styles, and the first one with a position that changed."""
        lines, used, style, first_changed = [''], 0, '', None
        for text, kind in cells:
            wanted = self._style(kind)
            for sign in text:
                columns = _columns(sign)
                if used + columns > width:
                    lines[-1] += '\x1b[0m' if style else ''
                    lines, used, style = [*lines, ''], 0, ''
                if wanted != style:
                    lines[-1] += '\x1b[0m' + wanted
                    style = wanted
                lines[-1] += sign
                used += columns
            if first_changed is None and kind in ('revealed', 'remasked'):
                first_changed = len(lines) - 1
        lines[-1] += '\x1b[0m' if style else ''
        return lines, first_changed or 0

    def _style(self, kind: str) -> str:
        plain, colour = _STYLES[kind]
        codes = ';'.join(code for code in (plain, colour if self._colour else '') if code)
        return f'\x1b[{codes}m' if codes else ''

    def _encodes(self, text: str) -> bool:
        try:
            text.encode(self._stream.encoding or 'utf-8')
        except UnicodeEncodeError:
            return False
        return True

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError:
            silence(self._stream)  # a window that was closed does not end the sampling


def _columns(sign: str) -> int:
    """Columns that a printable character takes on a terminal."""
    if unicodedata.combining(sign):
        return 0
    return 2 if unicodedata.east_asian_width(sign) in 'WF' else 1


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 1] + '.'
