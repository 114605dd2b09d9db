"""What the study saves of an experiment, and a check of the saved files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

from core.common.errors import UserError
from core.common.typed_json import Count, Interval, Items, Seconds, Share, Unfit, checked, read_json
from core.evaluation.error_detection import Calibrated, Probable, Ranked
from core.evaluation.likelihood import LikelihoodResult
from core.evaluation.nelbo import NelboResult


class Record(TypedDict):
    """An experiment: the command of its training, and what metrics.jsonl says about it; the rows of evaluate.py's
    measure, the seconds that they took, and the command that makes them."""

    training: str
    iterations: NotRequired[Count]
    seconds: NotRequired[Seconds]
    step_ms: NotRequired[Seconds]
    losses: NotRequired[dict[str, float]]
    validations: NotRequired[Annotated[list[dict[str, float]], Items(1)]]
    rows: NotRequired[Annotated[list[dict[str, object]], Items(1)]]
    evaluation_seconds: NotRequired[Seconds]
    evaluation: NotRequired[str]


class Text(TypedDict):
    """The text that a row belongs to."""

    dataset: str
    split: str


class NelboRow(Text, NelboResult):
    """A row of nelbo."""

    windows: Count


class LikelihoodRow(Text, LikelihoodResult):
    """A row of likelihood."""

    policy: str
    trunk_calls: Count
    head: Literal['none', 'wave', 'left_to_right']
    block_length: NotRequired[Count]  # of block models
    windows: Count
    seed: int


class Detected(Text):
    """The fields of every row of errors."""

    detector: str
    windows: Count
    remasking: str | None


class RankedRow(Detected, Ranked):
    """A detector that only ranks tokens, at a share of masks."""

    mask_share: Share


class ProbableRow(Detected, Probable):
    """A detector that gives probabilities, at a share of masks."""

    mask_share: Share


class CalibratedRow(Detected, Calibrated):
    """The critic over all shares of masks."""

    mask_shares: list[Share]


class Sampled(Text):
    """The fields of every row of curves."""

    dtype: str
    samples: Count
    length: Count
    batch_size: Count
    seed: int
    sampler_head: bool
    critic: bool
    reference_bits: float | None
    reference_bits_interval: Interval | None
    entropy_3: float
    known_words: float | None
    copied_span: float | None
    repetition: float | None


class ControlRow(Sampled):
    """Texts that no setting made, or that a setting made without a policy."""

    control: str
    trunk_calls: NotRequired[float]
    network_calls: NotRequired[float]
    seconds: NotRequired[Seconds]


class PolicyRow(Sampled):
    """Texts that a setting made by a policy."""

    policy: str
    wanted_calls: Count | None
    temperature: float
    guidance: NotRequired[str]
    options: dict[str, float]
    trunk_calls: float
    network_calls: float
    seconds: Seconds


ROWS = {'nelbo': NelboRow, 'likelihood': LikelihoodRow, 'errors': RankedRow | ProbableRow | CalibratedRow,
        'curves': ControlRow | PolicyRow}


def read_records(path: Path, measures: Mapping[str, str | None]) -> dict[str, Record]:
    """The saved records of a section; none if there is no file. measures: the measure of each experiment, by its name.
    UserError if a record is not as the study saves it."""
    if not path.exists():
        return {}
    try:
        records = checked(read_json(path), dict[str, Record])
        for name, record in records.items():
            measure = measures.get(name)
            if (measure is not None) != ('rows' in record) and name in measures:
                raise Unfit(f'{name} {"holds" if measure is None else "lacks"} rows')
            if measure is not None:
                checked(record['rows'], list[ROWS[measure]], f'{name}.rows')
        return records
    except Unfit as error:
        raise UserError(f'{path} is damaged ({error}); take it from the repository again') from None
