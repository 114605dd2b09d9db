"""A sampling run as a picture: text that condenses out of masks, moving (GIF) or as a strip for print (PNG).

The first text of the run is drawn on a grid of characters, in the lines and words of the finished text. A frame is a
trunk call with what it revealed and took back. New tokens are bold, underlined and green, tokens taken back are struck,
masks are a shade; so a reader who sees no colours can tell them apart. Drawn with Pillow in the fonts of Matplotlib.
"""

import io
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from core.common.files import write_whole
from core.common.printing import escaped
from core.sampling.replay import Decode, replay_data
from core.sampling.trace import Trace

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

MOVING, STILL = '.gif', '.png'
LARGEST = 1_500_000  # bytes of a moving picture
FRAMES = 64  # of a moving picture at most
STRIP_FRAMES = 5
COLUMNS, ROWS = 64, 32  # characters of a text that are shown
SECONDS, FIRST_SECONDS, LAST_SECONDS = 8, 0.8, 3  # all frames together, of the first, of the last
CELL, FONT_SIZE = (12, 26), 20  # pixels
MARGIN = 24
MASK = '░'

PAGE, RULE, INK, QUIET, SHADE = '#fbfaf7', '#d4d0c6', '#1d2126', '#5c636b', '#a39f92'
GREEN, BROWN, BLUE = ('#116329', '#cdeed3'), ('#8a3b00', '#ffe3c7'), ('#28418f', '#e2e7fa')  # ink and ground
LOOKS = {'masked': (SHADE, PAGE), 'settled': (INK, PAGE), 'revealed': GREEN, 'remasked': BROWN, 'protected': BLUE}
NAMES = {'masked': 'masked', 'revealed': 'new', 'remasked': 'taken back', 'protected': 'prompt'}


# What is shown --------------------------------------------------------------------------------------------------------

class Moment(NamedTuple):
    """The text after a step: the kind of each position, a name in `LOOKS`, and its characters; caption: where the run
    is."""

    caption: str
    kinds: list[str]
    texts: list[str]


def moments(trace: Trace, decode: Decode, most: int) -> list[Moment]:
    """The first text at the start, after at most `most` - 2 steps evenly through the run, and finished.

    A position is new where it was drawn since the moment before, and taken back where it held a token then and holds
    none now.
    """
    data = replay_data(trace.alone(), decode)
    run = _Run(data)
    last = len(run.states) - 1
    count = min(last + 1, max(2, most - 1))
    shown = sorted({round(index * last / max(1, count - 1)) for index in range(count)})
    found = [run.moment(number, before) for number, before in zip(shown, [0, *shown])]
    return [*found, run.moment(last, last)._replace(caption='finished')]


class _Run:
    """The tokens of a text after each step of `data`, as `replay_data` describes it."""

    def __init__(self, data: dict[str, Any]) -> None:
        sample, self.pieces = data['samples'][0], data['pieces']
        self.protected = set(sample['protected'])
        tokens: list[int | None] = [None] * data['length']
        for position, token in zip(sample['protected'], sample['prompt']):
            tokens[position] = token
        drawn = [0] * data['length']  # the number of the state in which each position was drawn last
        self.states, self.captions = [(tokens, drawn)], ['start']
        steps = [list(frames) for _, frames in groupby(sample['frames'], lambda one: (one['window'], one['step']))]
        blocks = max((frame['window'] for frame in sample['frames']), default=0) + 1
        for number, frames in enumerate(steps, start=1):
            tokens, drawn = tokens.copy(), drawn.copy()
            for frame in frames:
                new = frame.get('tokens', [None] * len(frame['positions']))
                for position, token in zip(frame['positions'], new):
                    tokens[position], drawn[position] = token, number
            block = f'block {frames[0]["window"] + 1} of {blocks}, ' if blocks > 1 else ''
            self.states.append((tokens, drawn))
            self.captions.append(f'{block}step {number} of {len(steps)}')

    def moment(self, number: int, before: int) -> Moment:
        """State `number`, where state `before` was shown last."""
        tokens, drawn = self.states[number]
        kinds, texts = [], []
        for position, (token, old) in enumerate(zip(tokens, self.states[before][0])):
            taken = token is None and old is not None
            kinds.append('protected' if position in self.protected else 'remasked' if taken else
                         'masked' if token is None else 'revealed' if drawn[position] > before else 'settled')
            texts.append(self._text(old if taken else token))
        return Moment(self.captions[number], kinds, texts)

    def _text(self, token: int | None) -> str:
        return '' if token is None else self.pieces[str(token)]


def visible(text: str) -> str:
    """`text` with a sign for each character that has no look of its own."""
    return escaped(text, '·').replace('\n', '↵').replace('\t', '⇥')


class Place(NamedTuple):
    """Where a position is drawn: row, first column, number of columns."""

    row: int
    column: int
    width: int


def places(texts: Sequence[str]) -> list[Place]:
    """Where each token of a finished text is drawn: whole words on lines of `COLUMNS`, line breaks as in the text."""
    found: list[Place] = []
    row = column = 0
    for word in _words(texts):
        widths = [min(COLUMNS, max(1, len(visible(text)))) for text in word]
        if column and column + sum(widths) > COLUMNS and sum(widths) <= COLUMNS:
            row, column = row + 1, 0
        for text, width in zip(word, widths):
            if column + width > COLUMNS:
                row, column = row + 1, 0
            found.append(Place(row, column, width))
            column += width
            if '\n' in text:
                row, column = row + text.count('\n'), 0
    return found


def _words(texts: Sequence[str]) -> list[list[str]]:
    """The tokens, those of a word together; space and line break end a word, a space before a letter begins one."""
    words: list[list[str]] = []
    open = False
    for text in texts:
        begins = text[:1].isspace() and not text.isspace()
        if not open or begins:
            words.append([])
        words[-1].append(text)
        open = not text[-1:].isspace()
    return words


# How it is drawn ------------------------------------------------------------------------------------------------------

class Painter:
    """Draws moments of one run at the same places; hidden: how many positions are below the last row shown."""

    def __init__(self, shown: Sequence[Moment]) -> None:
        self.places = places(shown[-1].texts)
        self.hidden = sum(place.row >= ROWS for place in self.places)
        rows = min(ROWS, max((place.row for place in self.places), default=0) + 1)
        self.kinds = [kind for kind in NAMES if any(kind in moment.kinds for moment in shown)]
        self.width, self.height = 2 * MARGIN + COLUMNS * CELL[0], rows * CELL[1]

    @cached_property
    def _fonts(self) -> tuple[Any, Any]:
        """The plain one and the bold one, of the same width."""
        import matplotlib
        from PIL import ImageFont

        folder = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
        return tuple(ImageFont.truetype(folder / name, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
                     for name in ('DejaVuSansMono.ttf', 'DejaVuSansMono-Bold.ttf'))

    def frame(self, moment: Moment) -> 'Image':
        """One picture: the text, a line that says where the run is, and what the looks mean."""
        return self._stacked([moment])

    def strip(self, shown: Sequence[Moment]) -> 'Image':
        """One picture with the text at several moments below each other."""
        return self._stacked(shown)

    def _stacked(self, shown: Sequence[Moment]) -> 'Image':
        from PIL import Image, ImageDraw

        part = self.height + CELL[1] + MARGIN
        picture = Image.new('RGB', (self.width, MARGIN + len(shown) * part + CELL[1] + MARGIN // 2), PAGE)
        pen = ImageDraw.Draw(picture)
        for number, moment in enumerate(shown):
            self._paint(pen, moment, MARGIN + number * part)
        self._legend(pen, picture.height - CELL[1] - MARGIN // 2)
        return picture

    def _paint(self, pen: 'ImageDraw', moment: Moment, top: int) -> None:
        """A moment from `top` pixels on: its text, then its caption below a thin line."""
        for place, kind, text in zip(self.places, moment.kinds, moment.texts):
            if place.row < ROWS:
                self._cell(pen, (MARGIN + place.column * CELL[0], top + place.row * CELL[1]), place.width, kind, text)
        line = top + self.height + CELL[1] // 4
        pen.line((MARGIN, line, self.width - MARGIN, line), RULE)
        masked = sum(kind in ('masked', 'remasked') for kind in moment.kinds) / max(1, len(moment.kinds))
        share = f'{math.ceil(100 * masked)}% masked'
        self._write(pen, (MARGIN, line + 2), moment.caption, QUIET)
        self._write(pen, (self.width - MARGIN - len(share) * CELL[0], line + 2), share, QUIET)

    def _cell(self, pen: 'ImageDraw', corner: tuple[int, int], width: int, kind: str, text: str) -> None:
        """A position; a token that is longer than the finished one is cut at its place."""
        (left, top), (ink, ground) = corner, LOOKS[kind]
        right, bottom = left + width * CELL[0] - 1, top + CELL[1] - 1
        signs = MASK * width if kind == 'masked' else visible(text)
        if len(signs) > width:
            signs = signs[:width - 1] + '…'
        pen.rectangle((left, top, right, bottom - 2), ground)
        quiet = kind == 'settled' and not text.isprintable()  # a line break
        self._write(pen, corner, signs, SHADE if quiet else ink, bold=kind == 'revealed')
        if kind in ('revealed', 'protected'):
            pen.line((left, bottom - 3, right, bottom - 3), ink, 2 if kind == 'revealed' else 1)
        if kind == 'protected':
            pen.line((left, bottom - 1, right, bottom - 1), ink)
        if kind == 'remasked':
            pen.line((left, top + CELL[1] // 2, right, top + CELL[1] // 2), ink, 2)

    def _legend(self, pen: 'ImageDraw', top: int) -> None:
        left = MARGIN
        for kind in self.kinds:
            self._cell(pen, (left, top), 2, kind, 'ab')
            self._write(pen, (left + 3 * CELL[0], top), NAMES[kind], QUIET)
            left += (len(NAMES[kind]) + 5) * CELL[0]

    def _write(self, pen: 'ImageDraw', corner: tuple[int, int], text: str, ink: str, bold: bool = False) -> None:
        for number, sign in enumerate(text):  # one by one, so that a sign that is wider moves no other
            if not sign.isspace():
                pen.text((corner[0] + number * CELL[0], corner[1]), sign, ink, self._fonts[bold])


# Files ----------------------------------------------------------------------------------------------------------------

def write_picture(trace: Trace, decode: Decode, path: Path) -> str:
    """Write the picture that the end of the path asks for, `MOVING` or `STILL`, whole or not at all; returns what is to
    be told beyond its path, '' where all is shown. UserError where the file cannot be written."""
    if path.suffix.lower() == STILL:
        shown = moments(trace, decode, STRIP_FRAMES + 1)
        del shown[-2]  # the last step, whose text is the finished one
        painter, file = Painter(shown), io.BytesIO()
        painter.strip(shown).save(file, 'PNG', optimize=True)
        data = file.getvalue()
    else:
        data, painter = moving_picture(trace, decode)
    write_whole(path, data)
    return f', without the last {painter.hidden} tokens, for which it has no room' if painter.hidden else ''


def moving_picture(trace: Trace, decode: Decode) -> tuple[bytes, Painter]:
    """A GIF of at most `LARGEST` bytes: with fewer frames where all of them would be more."""
    most = FRAMES
    while True:
        shown = moments(trace, decode, most)
        painter = Painter(shown)
        data = encoded([painter.frame(moment) for moment in shown])
        if len(data) <= LARGEST or most <= 4:
            return data, painter
        most //= 2


def encoded(frames: Sequence['Image']) -> bytes:
    """Frames as a GIF that repeats; all share one palette, so that a frame holds what is new in it and no more."""
    palette = _palette()
    frames = [frame.quantize(palette=palette, dither=0) for frame in frames]
    each = min(500, max(60, 1000 * SECONDS // len(frames)))
    milliseconds = [int(1000 * FIRST_SECONDS), *[each] * (len(frames) - 2), int(1000 * LAST_SECONDS)]
    file = io.BytesIO()
    frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, optimize=False)
    return file.getvalue()


def _palette() -> 'Image':
    """Every ink on its ground, with the blends that smooth the edges of letters."""
    from PIL import Image, ImageColor

    pairs = [*LOOKS.values(), (QUIET, PAGE), (RULE, PAGE)]
    colours = []
    for pair in pairs:
        ink, ground = map(ImageColor.getrgb, pair)
        colours += [tuple(round(under + share / 4 * (over - under)) for over, under in zip(ink, ground))
                    for share in range(5)]
    distinct = list(dict.fromkeys(colours))
    image = Image.new('P', (1, 1))
    image.putpalette([value for colour in distinct for value in colour])
    return image
