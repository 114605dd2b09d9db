"""Markdown that the program writes: tables, and reports between two marker lines of a page that is written by hand."""

from collections.abc import Sequence
from pathlib import Path

from core.common.errors import UserError
from core.common.files import write_whole


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table in aligned columns: the first to the left, figures to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    return ['| ' + ' | '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + ' |'
            for row in (head, rule, *rows)]


def write_between(path: Path, begin: str, end: str, text: str, usual: str) -> None:
    """Put `text` between the marker lines of `path`; all else stays. Atomic."""
    before, after = split_at_markers(path, begin, end, usual)
    write_whole(path, f'{before}{begin}\n\n{text}\n\n{end}{after}')


def split_at_markers(path: Path, begin: str, end: str, usual: str) -> tuple[str, str]:
    """The text before and after the two marker lines; UserError unless `path` holds each once, in this order.

    `usual` names the page that has them.
    """
    try:
        content = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError):
        raise UserError(f'cannot read {path}, where the report should go; give --report={usual}') from None
    before, found_begin, rest = content.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end or begin in rest or end in after:
        raise UserError(f'{path} must hold the lines {begin!r} and {end!r} once, in this order, to tell where the '
                        f'report goes')
    return before, after
