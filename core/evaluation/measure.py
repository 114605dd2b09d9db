"""What evaluate.py's measures share: the checkpoint under measurement, the cells of a measure, and the result cache.

A measure is a list of cells. A cell is a setting and a function that computes its result; the run in
core/evaluation/run.py computes only those that the cache lacks. A new measure is one `Measure` and one row of MEASURES
there.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from core.checkpoints.checkpoint import Checkpoint
from core.common.errors import UserError
from core.common.files import write_whole
from core.common.runtime import Runtime
from core.data.corpus import Corpus
from core.data.vocabulary import Vocabulary
from core.evaluation.options import EvaluateConfig
from model import GPT

CACHE_NAME = 'evaluation.json'
CACHE_FORMAT = 2

Result = dict[str, Any]  # built-in types only, finite numbers only


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint ready to be measured.

    config: evaluate.py's flat dataclass of options; explicit: the options that were given; checkpoint: without a model
    of its own meaning here, for kind, config and iteration; checkpoint_hash: SHA-256 of its file; model: in evaluation
    mode on runtime's device, averaged weights; sampler_head: whether it has one whose training had begun; allowed bool
    [V]: the base vocabulary; out_dir: where pictures go.
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
        """`values` with what every result depends on beside the checkpoint: corpus, split and precision."""
        return {'dataset': self.corpus.name, 'data_hash': self.corpus.data_hash, 'split': self.config.split,
                'dtype': self.config.dtype, **values}


class Cell(NamedTuple):
    """settings: everything that the result depends on beside the checkpoint, in built-in types; compute: makes the
    result; cost: its share of the work, for the progress bar, in any unit."""

    settings: Result
    compute: Callable[[], Result]
    cost: float = 1.0


class Measure(NamedTuple):
    """cells: what there is to compute; UserError where the measure does not suit the checkpoint. columns: the names
    among settings and results that the printed table shows. summary: one line for --help. finish: pictures and reports
    from all rows (settings and result in one dict each). arrange: the table's rows from these, where they differ."""

    cells: Callable[[Evaluation], Sequence[Cell]]
    columns: tuple[str, ...]
    summary: str
    finish: Callable[[Evaluation, Sequence[Result]], None] | None = None
    arrange: Callable[[Sequence[Result]], Sequence[Result]] | None = None


class ResultCache:
    """Results on disk by checkpoint hash, measure and settings; every new one is written at once, atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read()  # a damaged file is said before hours of work

    def find(self, checkpoint_hash: str, measure: str, settings: Result) -> Result | None:
        """The result stored under these, None where there is none."""
        entry = self._read().get(_key(checkpoint_hash, measure, settings))
        return None if entry is None else entry['result']

    def store(self, checkpoint_hash: str, measure: str, settings: Result, result: Result) -> None:
        """Add a result to what the file holds by now, another process's results included."""
        entries = self._read()
        entries[_key(checkpoint_hash, measure, settings)] = {'checkpoint': checkpoint_hash, 'measure': measure,
                                                             'settings': settings, 'result': result}
        text = json.dumps({'format': CACHE_FORMAT, 'results': entries}, indent=1, allow_nan=False)
        write_whole(self.path, text + '\n')

    def _read(self) -> dict[str, Result]:
        if not self.path.exists():
            return {}
        try:
            stored = json.loads(self.path.read_bytes())
            if stored['format'] != CACHE_FORMAT or not all('result' in entry for entry in stored['results'].values()):
                raise ValueError(f'its format is not {CACHE_FORMAT}')
            return stored['results']
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(f'{self.path} is damaged or of another program ({error}); move it away, and results are '
                            f'computed again') from None


def _key(checkpoint_hash: str, measure: str, settings: Result) -> str:
    """SHA-256 (hex) over everything that a result depends on."""
    return hashlib.sha256(json.dumps([checkpoint_hash, measure, settings], sort_keys=True).encode()).hexdigest()
