"""The measure `nelbo`: the bound of a diffusion checkpoint, the exact negative log-likelihood of a causal one."""

from typing import TypedDict

from core.common.typed_json import Seconds
from core.evaluation.measure import Cell, Evaluation, Measure, Result
from core.validation import HeldOut, validate_generator

WINDOWS = 512


class NelboResult(TypedDict):
    """kind: of the checkpoint; bits: per `unit`."""

    kind: str
    nats: float
    standard_error: float
    bits: float
    unit: str
    seconds: Seconds


def nelbo_cells(evaluation: Evaluation) -> list[Cell]:
    """The NELBO of a diffusion checkpoint, the exact negative log-likelihood of a causal one."""
    config = evaluation.config
    windows = config.windows or WINDOWS

    def compute() -> Result:
        held_out = HeldOut(evaluation.corpus, evaluation.runtime, windows, config.batch_size, config.split)
        found = validate_generator(evaluation.model, held_out, evaluation.allowed)
        return {'kind': evaluation.checkpoint.kind, 'nats': found.value, 'standard_error': found.standard_error,
                'bits': found.further['bits'], 'unit': found.bits_per, 'seconds': found.seconds}

    return [Cell(evaluation.settings(windows=windows), NelboResult, compute)]


NELBO = Measure(nelbo_cells, ('split', 'kind', 'nats', 'standard_error', 'bits', 'unit', 'windows', 'seconds'),
                'upper bound on the negative log-likelihood, nats per token (causal: the likelihood itself)')
