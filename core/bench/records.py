"""The files of bench.py's two measurements: a record in JSON, and tables between two marker lines of a page."""

import json
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

from core.bench.options import BenchConfig
from core.common.errors import UserError
from core.common.files import why_unwritable, write_whole
from core.common.tables import split_at_markers, write_between
from core.common.typed_json import Items, Range, Seconds, Unfit, checked, read_json

COPY = 'copy'  # name of a rate of a group; the other rates have the names of dtypes


FORMAT, VERSION = 'masked-diffusion-benchmark', 2
SCALING_FORMAT, SCALING_VERSION = 'masked-diffusion-scaling', 1

Dimension = Annotated[int, Range(1, 10 ** 9)]
Positive = Annotated[float, Range(1e-12)]
Rounds = Annotated[list[Positive], Items(1)]  # a figure of each round


class Machine(TypedDict):
    """The machine and the versions of packages, which begin with python, torch and numpy."""

    versions: dict[str, str | None]
    git_revision: str | None
    platform: str
    processors: int | None
    threads: int
    devices: list[str]
    processor: str
    fast_bfloat16: bool
    load_average: float | None  # None if the system tells none, as on Windows


class ShapeFields(TypedDict):
    """The fields of a `Shape`."""

    n_layer: Dimension
    n_head: Dimension
    n_embd: Dimension
    block_size: Dimension
    batch_size: Dimension
    base_size: NotRequired[Dimension]
    sampler_output: NotRequired[Literal['own', 'shared_detached']]


class CaseRecord(TypedDict):
    """seconds: of one call, per round; first_seconds: of the very first call; the rest as in `Case`."""

    seconds: Rounds
    first_seconds: Seconds
    operations: Positive
    tokens: Dimension
    dtype: str
    bytes: Annotated[float, Range(0.0)] | None


class Group(TypedDict):
    """rates: by dtype or 'copy', per round; cases: by name."""

    rates: dict[str, Rounds]
    cases: Annotated[dict[str, CaseRecord], Items(1)]


BASELINES = [f'baseline, {dtype}, {form}' for dtype in ('float32', 'bfloat16') for form in ('eager', 'compiled')]
TrainingCases = TypedDict('TrainingCases', {
    'baseline': NotRequired[CaseRecord],  # eager float32, in old records, which lack its other forms
    **{name: NotRequired[CaseRecord] for name in BASELINES}, 'causal': CaseRecord, 'stage 1': CaseRecord, 'stage 2': CaseRecord,
    'stage 3': CaseRecord, 'block': NotRequired[CaseRecord]})
FillCases = TypedDict('FillCases', {'trunk call': CaseRecord, 'wavefront fill': CaseRecord})


class Training(TypedDict):
    """As `Group`."""

    rates: dict[str, Rounds]
    cases: TrainingCases


class Fill(TypedDict):
    """As `Group`."""

    rates: dict[str, Rounds]
    cases: FillCases


class Run(TypedDict):
    """A policy's run: tokens written, calls, and seconds per round: of the run, inside its trunk calls, and inside its
    network calls."""

    tokens: Dimension
    seconds: Rounds
    trunk_seconds: Rounds
    network_seconds: Rounds
    trunk_calls: Dimension
    network_calls: Dimension


class Policies(TypedDict):
    """bare_seconds: of a single trunk call, per round."""

    bare_seconds: Rounds
    runs: dict[str, Run]


class ShapeRecord(TypedDict):
    """How a shape was measured, and the results."""

    shape: ShapeFields
    device: str
    dtype: str
    sampling_dtype: str
    compile: bool
    critic_row_stride: Dimension
    parameters: Dimension
    training: NotRequired[Training]
    fill: NotRequired[Fill]
    sampling: NotRequired[Group]
    decode: NotRequired[Group]
    policies: NotRequired[Policies]


class BenchRecord(TypedDict):
    """What bench.py writes."""

    format: Literal['masked-diffusion-benchmark']
    version: Literal[2]
    machine: Machine
    shapes: dict[str, ShapeRecord]


class SizeFields(TypedDict):
    """The fields of a `Size`."""

    n_layer: Dimension
    n_head: Dimension
    n_embd: Dimension
    block_size: Dimension
    vocab_size: Annotated[int, Range(5, 10 ** 9)]
    rows: Dimension
    micro_steps: Dimension
    ranks: Dimension
    sampler: Literal['own', 'shared_detached'] | None
    sampler_n_embd: Dimension | None
    critic: bool
    critic_row_stride: Dimension
    optimizer: Literal['muon', 'adamw']
    sharded: bool
    recompute: bool
    bfloat16: bool
    device: NotRequired[Literal['cpu', 'cuda']]
    steps: Dimension


class SizeRecord(TypedDict):
    """What core/bench/scaling_run.py measured of a size. Lists have an item for each step; there are at least two."""

    size: SizeFields
    parameters: Dimension
    seconds: Annotated[list[Positive], Items(2)]
    rates: Annotated[list[Positive], Items(2)]
    positions: Annotated[list[Annotated[list[Dimension], Items(1)]], Items(2)]
    predicted: Annotated[list[Dimension], Items(2)]
    tensor_bytes: int
    process_bytes: int


class ScalingRecord(TypedDict):
    """What bench.py --scaling writes."""

    format: Literal['masked-diffusion-scaling']
    version: Literal[1]
    machine: Machine
    sizes: dict[str, SizeRecord]


class RecordKind(NamedTuple):
    """What one measurement writes. command: the command that writes it. contents: the type of its record. page: the
    page of the docs with its tables. begin, end: the marker lines around them."""

    command: str
    contents: type[BenchRecord] | type[ScalingRecord]
    page: str
    begin: str
    end: str


def name_problems(option: str, names: Sequence[str], known: Collection[str]) -> list[str]:
    """What is wrong with `names` as the value of `option`."""
    problems = [f'{option} names {one!r}, but there are {" and ".join(known)}; give --{option}={",".join(known)}'
                for one in names if one not in known]
    return problems + [f'{option} names {one!r} twice; leave one out' for one in known if names.count(one) > 1]


def file_problems(config: BenchConfig, explicit: Mapping[str, str], kind: RecordKind) -> list[str]:
    """What is wrong with the options json, report and from_json; checked before minutes are spent."""
    problems = []
    if config.from_json is not None:
        problems += [f'{name} was given, but --from_json measures nothing; leave one of them out'
                     for name in explicit if name not in ('from_json', 'report', 'scaling')]
    if config.json is not None and (reason := why_unwritable(config.json)) is not None:
        problems.append(f'json is {config.json!r}, but {reason}')
    elif config.json is not None and _holds_something_else(Path(config.json), kind):
        problems.append(f'json is {config.json!r}, which holds something other than a record of {kind.command} and stays; '
                        f'choose another name')
    if config.report is not None:
        try:
            split_at_markers(Path(config.report), kind.begin, kind.end, kind.page)
        except UserError as error:
            problems.append(str(error))
    return problems


def _holds_something_else(path: Path, kind: RecordKind) -> bool:
    """Whether `path` is a file that holds something else than a record of `kind`, in any version."""
    if not path.is_file() or not path.stat().st_size:
        return False
    try:
        record = read_json(path)
    except Unfit:
        return True
    return not isinstance(record, dict) or record.get('format') != _heading(kind)[0]


def _heading(kind: RecordKind) -> list[object]:
    """Format and version of the records of `kind`."""
    return [typing.get_args(kind.contents.__annotations__[name])[0] for name in ('format', 'version')]


def read_json_record(path: Path, kind: RecordKind) -> Any:
    """A record of `kind` that --json wrote. UserError for anything else."""
    try:
        record = read_json(path)
        if not isinstance(record, dict) or [record.get(name) for name in ('format', 'version')] != _heading(kind):
            raise Unfit(f'it is not a record of this {kind.command}')
        checked(record, kind.contents)
        problem = next(_inconsistencies(record), None)
        if problem is not None:
            raise Unfit(problem)
        return record
    except Unfit as error:
        raise UserError(f'cannot read {path}: {error}; make it with {kind.command} --json={path}') from None


def _inconsistencies(record: Mapping[str, Any]) -> Iterator[str]:
    """Figures of a record that contradict each other in ways that types do not show."""
    for name, entry in record.get('shapes', {}).items():
        for group in (one for one in ('training', 'fill', 'sampling', 'decode') if one in entry):
            place, rates, cases = f'{name}.{group}', entry[group]['rates'], entry[group]['cases']
            if len({len(one) for one in (*rates.values(), *(case['seconds'] for case in cases.values()))}) > 1:
                yield f'the rounds of {place} differ in number'
            for one in cases.values():
                if one['dtype'] not in rates or one['bytes'] is not None and COPY not in rates:
                    yield f'{place} lacks the rate of a case'
            method, partner = {'sampling': ('diffusion', 'standard, {}'),
                               'decode': ('diffusion', 'causal_decode, {}')}.get(group, (None, ''))
            for case in cases if method else ():
                batch = partner.format(case.partition(', ')[2])
                if case.startswith(method) and not any(one.startswith(batch.rpartition(', ')[0]) for one in cases):
                    yield f'{place} has {case} without {batch} to compare it with'
        policies = entry.get('policies', {'bare_seconds': [], 'runs': {}})
        if any(len(run[key]) != len(policies['bare_seconds']) for run in policies['runs'].values()
               for key in ('seconds', 'trunk_seconds', 'network_seconds')):
            yield f'the rounds of {name}.policies differ in number'
    for name, size in record.get('sizes', {}).items():
        if len({len(size[key]) for key in ('seconds', 'rates', 'positions', 'predicted')}) > 1:
            yield f'the steps of {name} differ in number'
        if size['size']['n_embd'] % size['size']['n_head']:
            yield f'{name} has {size["size"]["n_embd"]} channels for {size["size"]["n_head"]} heads'


def show_and_write(config: BenchConfig, record: BenchRecord | ScalingRecord, text: str, kind: RecordKind,
                   say: Callable[[str], object]) -> None:
    """Print the tables, and write record and tables to the files that the options json and report name."""
    say(f'\n{text}')
    if config.json is not None:
        write_whole(Path(config.json), json.dumps(record, indent=1) + '\n')
        say(f'record written to {config.json}')
    if config.report is not None:
        write_between(Path(config.report), kind.begin, kind.end, text, kind.page)
        say(f'tables written to {config.report}')
