"""The files of bench.py's two measurements: a record in JSON, and tables between two marker lines of a page."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from core.common.errors import UserError
from core.common.files import write_whole
from core.common.tables import split_at_markers, write_between

PAGE = 'docs/performance.md'


class RecordKind(NamedTuple):
    """What one measurement writes. command: that makes it; format: what its record calls itself; versions: that are
    read, the one that is written last; begin, end: the marker lines of its tables."""

    command: str
    format: str
    versions: tuple[int, ...]
    begin: str
    end: str


def name_problems(option: str, given: str, known: Collection[str]) -> list[str]:
    """What is wrong with the names in `given`, with a comma between, as the value of `option`."""
    names = given.split(',')
    problems = [f'{option} names {one!r}, but there are {" and ".join(known)}; give --{option}={",".join(known)}'
                for one in names if one not in known]
    return problems + [f'{option} names {one!r} twice; leave one out' for one in known if names.count(one) > 1]


def file_problems(config: Any, explicit: Mapping[str, str], kind: RecordKind) -> list[str]:
    """What is wrong with the options json, report and from_json, found before minutes are spent."""
    problems = []
    if config.from_json is not None:
        problems += [f'{name} was given, but --from_json measures nothing; leave one of them out'
                     for name in explicit if name not in ('from_json', 'report')]
    if config.json is not None and not Path(config.json).absolute().parent.is_dir():
        problems.append(f'cannot write {config.json}: its folder does not exist; create it first')
    if config.report is not None:
        try:
            split_at_markers(Path(config.report), kind.begin, kind.end, PAGE)
        except UserError as error:
            problems.append(str(error))
    return problems


def read_json_record(path: Path, kind: RecordKind) -> dict[str, Any]:
    """A record of `kind` that --json wrote. UserError for anything else."""
    cure = f'make it with {kind.command} --json={path}'
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}; {cure}') from None
    except ValueError:
        raise UserError(f'{path} is not JSON; {cure}') from None
    if not isinstance(record, dict) or record.get('format') != kind.format or \
            record.get('version') not in kind.versions:
        raise UserError(f'{path} is not a record of this {kind.command} (version {kind.versions[-1]}); make it anew '
                        f'with {kind.command} --json={path}')
    return record


def show_and_write(config: Any, record: Mapping[str, Any], text: str, kind: RecordKind,
                   say: Callable[[str], object]) -> None:
    """Print the tables, and write record and tables where the options json and report say."""
    say(f'\n{text}')
    if config.json is not None:
        write_whole(Path(config.json), json.dumps(record, indent=1) + '\n')
        say(f'record written to {config.json}')
    if config.report is not None:
        write_between(Path(config.report), kind.begin, kind.end, text, PAGE)
        say(f'tables written to {config.report}')
