"""What evaluate.py's measures share: the checkpoint under measurement, the cells of a measure, and the result cache.

A measure is a list of cells. A cell is a setting and a function that computes its result. core/evaluation/run.py
computes only the results that the cache lacks. A new measure is one `Measure` and one row of MEASURES in that file.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from torch import Tensor

from core.checkpoints.checkpoint import Checkpoint
from core.common.errors import UserError
from core.common.files import write_whole
from core.common.locks import ChangeLock
from core.common.runtime import Runtime
from core.common.typed_json import CHECKSUM, Seconds, Unfit, checked, read_json, verify_checksum, with_checksum
from core.data.corpus import Corpus
from core.data.vocabulary import Vocabulary
from core.evaluation.options import EvaluateConfig
from model import GPT

CACHE_NAME = 'evaluation.json'
CACHE_FORMAT = 3

Result = dict[str, Any]  # built-in types only, finite numbers only


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint ready to be measured.

    explicit: the options that were given. checkpoint: read for its kind, options and iteration, not for its weights.
    checkpoint_hash: SHA-256 of its file. model: in evaluation mode on runtime's device, with averaged weights.
    sampler_head: whether the model has one whose training had begun. allowed bool [V]: the base vocabulary. out_dir:
    folder for pictures.
    """

    config: EvaluateConfig
    explicit: Mapping[str, str]
    checkpoint: Checkpoint
    checkpoint_hash: str
    model: GPT
    sampler_head: bool
    vocabulary: Vocabulary
    corpus: Corpus
    allowed: Tensor
    runtime: Runtime
    out_dir: Path
    say: Callable[[str], None]

    def settings(self, **values: Any) -> Result:
        """`values` and what else every result depends on, apart from the checkpoint: corpus, split and precision."""
        return {'dataset': self.corpus.name, 'data_hash': self.corpus.data_hash, 'split': self.config.split,
                'dtype': self.config.dtype, **values}


class Cell(NamedTuple):
    """settings: everything that the result depends on apart from the checkpoint, in built-in types. kind: the TypedDict
    of the result. compute: makes the result. cost: its share of the work, in any unit, for the progress bar."""

    settings: Result
    kind: type
    compute: Callable[[], Result]
    cost: float = 1.0


class Measure(NamedTuple):
    """cells: what to compute; raises UserError if the measure does not suit the checkpoint. columns: the settings and
    results that the printed table shows. summary: one line for --help. finish: makes pictures and reports from all rows
    (a row is a cell's settings and result in one dict). arrange: makes the table's rows from these, if they differ."""

    cells: Callable[[Evaluation], Sequence[Cell]]
    columns: tuple[str, ...]
    summary: str
    finish: Callable[[Evaluation, Sequence[Result]], None] | None = None
    arrange: Callable[[Sequence[Result]], Sequence[Result]] | None = None


class StoredResult(TypedDict):
    """What the cache holds of a cell. result: of the cell's kind, with 'elapsed' added, the seconds that it took."""

    checkpoint: str
    measure: str
    settings: dict[str, object]
    result: dict[str, object]


class StoredResults(TypedDict):
    """The contents of evaluation.json. Format 2 has no checksum and can still be read."""

    sha256: NotRequired[str]
    format: Literal[2, 3]
    results: dict[str, StoredResult]


class ResultCache:
    """Results on disk by checkpoint hash, measure and settings. Each new result is written at once, atomically.

    Several processes may add results to one file. say: prints a line if the file system has no locks.
    """

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self.path, self._lock = path, ChangeLock(path, say)
        self._read()  # so that a damaged file is reported before hours of work

    def find(self, checkpoint_hash: str, measure: str, cell: Cell) -> Result | None:
        """The result of a cell; None if it is not stored. UserError if the stored result is not of the cell's kind."""
        entry = self._read().get(_key(checkpoint_hash, measure, cell.settings))
        if entry is None:
            return None
        try:
            elapsed = {'elapsed': checked(entry['result'].get('elapsed'), Seconds, f'{measure}.elapsed')}
            found = {name: value for name, value in entry['result'].items() if name != 'elapsed'}
            return {**checked(found, cell.kind, measure), **elapsed}
        except Unfit as error:
            raise self._damaged(error) from None

    def store(self, checkpoint_hash: str, measure: str, cell: Cell, result: Result) -> None:
        """Add a result to the file, and keep the results that other processes have added meanwhile."""
        with self._lock.held():
            entries = self._read()
            entries[_key(checkpoint_hash, measure, cell.settings)] = {
                'checkpoint': checkpoint_hash, 'measure': measure, 'settings': cell.settings, 'result': result}
            write_whole(self.path, with_checksum({'format': CACHE_FORMAT, 'results': entries}))

    def _read(self) -> dict[str, StoredResult]:
        if not self.path.exists():
            return {}
        try:
            stored = read_json(self.path)
            found = checked(stored, StoredResults)
            if found['format'] == CACHE_FORMAT or CHECKSUM in found:
                verify_checksum(stored)
            return found['results']
        except Unfit as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Unfit) -> UserError:
        return UserError(f'{self.path} is damaged or of another program ({error}); move it away, and results are '
                         f'computed again')


def _key(checkpoint_hash: str, measure: str, settings: Result) -> str:
    """SHA-256 (hex) over everything that a result depends on."""
    return hashlib.sha256(json.dumps([checkpoint_hash, measure, settings], sort_keys=True).encode()).hexdigest()
