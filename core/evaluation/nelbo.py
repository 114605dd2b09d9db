"""The measure `nelbo`: an upper bound on the negative log-likelihood of a diffusion or block checkpoint. For a causal
checkpoint it is exact."""

from functools import partial
from typing import TypedDict

from core.common.typed_json import Seconds
from core.evaluation.measure import Cell, Evaluation, Measure, Result
from core.validation import HeldOut, validate_block_length, validate_generator

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
    """One cell; for a block checkpoint, one for each of its block lengths."""
    config = evaluation.config
    windows, lengths = config.windows or WINDOWS, evaluation.model.config.block_length

    def compute(block_length: int | None) -> Result:
        held_out = HeldOut(evaluation.corpus, evaluation.runtime, windows, config.batch_size, config.split)
        found = validate_generator(evaluation.model, held_out, evaluation.allowed) if block_length is None else \
            validate_block_length(evaluation.model, held_out, evaluation.allowed, block_length)
        return {'kind': evaluation.checkpoint.kind, 'nats': found.value, 'standard_error': found.standard_error,
                'bits': found.further['bits'], 'unit': found.bits_per, 'seconds': found.seconds}

    if not lengths:
        return [Cell(evaluation.settings(windows=windows), NelboResult, lambda: compute(None))]
    return [Cell(evaluation.settings(windows=windows, block_length=length), NelboResult, partial(compute, length))
            for length in lengths]


NELBO = Measure(nelbo_cells, ('split', 'kind', 'block_length', 'nats', 'standard_error', 'bits', 'unit', 'windows',
                              'seconds'),
                'upper bound on the negative log-likelihood, nats per token (causal: the likelihood itself)')
