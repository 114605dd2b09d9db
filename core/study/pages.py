"""How the study writes the pages of tables in docs/results/, and which checkpoints it measures.

`python evaluate.py --report` goes through `SECTIONS` (core/study/results.py). If the checkpoint of an experiment
exists, it is measured; the cache in its folder saves what was measured earlier. If the checkpoint is missing, its saved
record is used. If there is no record either, the command that makes the checkpoint is printed.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from core.common.errors import UserError
from core.common.expressions import excerpt
from core.common.files import write_whole
from core.common.tables import markdown_table, split_at_markers, write_between
from core.evaluation.measure import Result
from core.evaluation.options import RESULTS_PAGE, EvaluateConfig
from core.evaluation.quality_tables import CURVE_COLUMNS, command_of, markers, rounded
from core.study.records import Record, read_records

TOTAL = 'total'  # name of the markers around `total_text`
METRICS_NAME = 'metrics.jsonl'
DROPPED = ('data_hash', 'dtype', 'batch_size', 'length', 'reference', 'causal', 'elapsed')  # of rows, except curves

Records = Mapping[str, Record]
Say = Callable[[str], object]  # where lines for the user go
Evaluate = Callable[[EvaluateConfig, Mapping[str, str]],
                    list[Result]]  # rows, from evaluate.py's options and those given


@dataclass(frozen=True)
class Experiment:
    """A checkpoint and what is measured of it.

    name: unique in its section. training: the command that makes the checkpoint. checkpoint: its path. measure,
    options: of evaluate.py; None if the report is about the training only. keeps: whether the record holds a row.
    """

    name: str
    training: str
    checkpoint: str
    measure: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    keeps: Callable[[Result], bool] = lambda row: True


class Section(NamedTuple):
    """name: of its markers in the page and of its record. text: makes Markdown from the existing records (at least
    one). draw: draws pictures into a folder. page: the page that holds the section."""

    name: str
    experiments: Sequence[Experiment]
    text: Callable[[Records], str]
    draw: Callable[[Records, Path, Say], None] | None = None
    page: str = RESULTS_PAGE


def write_report(config: EvaluateConfig, sections: Sequence[Section], evaluate: Evaluate, say: Say) -> None:
    """Write every section of the page `config.report`, and its pictures and records into the same folder."""
    page = Path(config.report)
    pages = list(dict.fromkeys(section.page for section in sections))
    sections = [section for section in sections if Path(section.page).name == page.name]
    if not sections:
        raise UserError(f'{page} is no page of the study; give --report={" or ".join(pages)}')
    for name in (*(section.name for section in sections), TOTAL):
        split_at_markers(page, *markers(name), page.name)
    folder = page.parent
    for section in sections:
        kept_records(folder, section)  # refuses damaged or foreign records before the work
    start, missing = time.perf_counter(), []
    for section in sections:
        kept, records = kept_records(folder, section), {}
        for experiment in section.experiments:
            if Path(experiment.checkpoint).exists():
                records[experiment.name] = measure(experiment, config, evaluate)
            elif experiment.name in kept:
                records[experiment.name] = kept[experiment.name]
            else:
                missing.append(f'{section.name}: no result of {experiment.name}, since {experiment.checkpoint} does '
                               f'not exist; make it with: {experiment.training}')
                continue
        if records:
            write_whole(folder / f'{section.name}.json', json.dumps(records, indent=None, ensure_ascii=False,
                                                               separators=(',', ':')).replace('},{', '},\n{') + '\n')
            write_between(page, *markers(section.name), section.text(records), section.page)
            if section.draw is not None:
                section.draw(records, folder, say)
            say(f'{section.name}: {len(records)} of {len(section.experiments)} experiments')
    kept = {section.name: kept_records(folder, section) for section in sections}
    if any(kept.values()):
        write_between(page, *markers(TOTAL), total_text(kept), page.name)
    for line in missing:
        say(line)
    say(f'{page} written after {time.perf_counter() - start:.0f} s')


def kept_records(folder: Path, section: Section) -> dict[str, Record]:
    """The records that an earlier report saved of a section, by experiment."""
    return read_records(folder / f'{section.name}.json', {one.name: one.measure for one in section.experiments})


def measure(experiment: Experiment, config: EvaluateConfig, evaluate: Evaluate) -> Record:
    """The record of an experiment whose checkpoint exists."""
    path = Path(experiment.checkpoint)
    record: Record = {'training': experiment.training, **training_facts(path.parent)}
    if experiment.measure is not None:
        options = {'out_dir': str(path.parent), 'checkpoint_name': path.name, **experiment.options}
        changed = dataclasses.replace(config, **options, measure=experiment.measure, report=None)
        explicit = dict.fromkeys(options, experiment.name)
        rows = evaluate(changed, explicit)
        record['rows'] = [{name: rounded(value) for name, value in row.items() if is_kept(experiment.measure, name)}
                          for row in rows if experiment.keeps(row)]
        record['evaluation_seconds'] = round(sum(row.get('elapsed', 0.0) for row in rows), 1)
        record['evaluation'] = command_of(changed, {name: where for name, where in explicit.items()
                                                    if name != 'checkpoint_name' or path.name != 'ckpt_best.pt'},
                                          experiment.measure)
    return record


def total_text(sections: Mapping[str, Records]) -> str:
    """A table of the seconds that each section's records took. A training that serves several records counts once.
    Sections without records are left out."""
    seen: dict[str, float] = {}
    body, evaluations = [], 0.0
    for name, records in sections.items():
        new = {record['training']: record['seconds'] for record in records.values()
               if 'seconds' in record and record['training'] not in seen}
        seen |= new
        seconds = sum(record.get('evaluation_seconds', 0.0) for record in records.values())
        evaluations += seconds
        if records:
            body.append([name, str(len(new)), f'{sum(new.values()):.0f}', f'{seconds:.0f}'])
    body.append(['together', str(len(seen)), f'{sum(seen.values()):.0f}', f'{evaluations:.0f}'])
    return '\n'.join(markdown_table(['section', 'trainings', 'seconds of training', 'seconds of evaluation'], body))


def is_kept(measure: str, column: str) -> bool:
    """Whether the record of a measure keeps a column of its rows. Curves have many rows, so they keep only the columns
    that tables and pictures show."""
    return column in CURVE_COLUMNS if measure == 'curves' else column not in DROPPED


def training_facts(run_folder: Path) -> dict[str, Any]:
    """What metrics.jsonl says about a training: iterations, seconds without validations, milliseconds of a step (the
    median of all logged ones except the first), and the validations. Empty if there is no file."""
    path = run_folder / METRICS_NAME
    if not path.exists():
        return {}
    try:
        return _facts([json.loads(line) for line in path.read_bytes().splitlines()])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{path} is damaged or of another program ({excerpt(str(error))}); move it away, and the page says '
                        f'nothing of that training') from error


def _facts(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = [line for line in lines if line['kind'] == 'iteration']
    validations = [line for line in lines if line['kind'] == 'evaluation']
    if not steps or not validations:
        raise ValueError('it holds no iteration or no validation')
    return {'iterations': validations[-1]['iteration'], 'seconds': round(validations[-1]['train_seconds'], 1),
            'step_ms': round(1000 * median(line['seconds'] for line in steps[1:] or steps), 1),
            'losses': {name: rounded(value) for name, value in steps[-1].items() if name.startswith('train/')},
            'validations': [{name.removeprefix('val/'): rounded(value) for name, value in line.items()
                             if name == 'iteration' or name.startswith('val/')} for line in validations]}
