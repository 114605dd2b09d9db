"""A tiny shape and made-up rounds of measurements."""

from core.bench.cases import Shape
from core.bench.records import COPY

TINY = Shape(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4)


def group(rate=(1.0, 1.0, 1.0), **seconds):
    return {'rates': {'float32': list(rate), COPY: [1.0, 4.0, 16.0]}, 'cases': {
        name: {'seconds': list(values), 'first_seconds': 9.0, 'operations': 2.0, 'tokens': 4, 'dtype': 'float32',
               'bytes': None} for name, values in seconds.items()}}
