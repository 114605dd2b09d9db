"""Where texts are cut into train, ref and val."""

from collections.abc import Mapping

from core.data.corpus import SPLITS

TRAIN_END, REF_END = 0.7, 0.9  # borders of train, ref and val as shares of a text


def cut_near(text: str, position: int, reach: int) -> int:
    """The place nearest to `position` right after a blank line, else right after a newline, else `position` itself.

    Places more than `reach` characters away do not count, so that the shares of the splits stay nearly exact.
    """
    for separator in ('\n\n', '\n'):
        before = text.rfind(separator, max(0, position - reach), position) + len(separator)
        after = text.find(separator, max(0, position - len(separator)), position + reach) + len(separator)
        found = [place for place in (before, after) if place >= len(separator) and abs(place - position) <= reach]
        if found:
            return min(found, key=lambda place: abs(place - position))
    return position


def split_text(text: str) -> dict[str, str]:
    """Contiguous train (70 %), ref (20 %) and val (10 %) of `text`. A cut is at a blank line if one is near."""
    reach = len(text) // 50
    first = cut_near(text, int(TRAIN_END * len(text)), reach)
    second = cut_near(text, int(REF_END * len(text)), reach)
    return {'train': text[:first], 'ref': text[first:second], 'val': text[second:]}


def split_plays(plays: Mapping[str, str]) -> dict[str, str]:
    """The splits of all plays, each joined in the order of `plays`. So each split has the style of every play."""
    parts = [split_text(text) for text in plays.values()]
    return {split: ''.join(part[split] for part in parts) for split in SPLITS}
