"""How good a text that was written is: one row a metric in `QUALITY_METRICS`, by the value of --quality_metric."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from core.common.errors import UserError
from core.common.printing import counted
from core.common.randomness import RowRandom
from core.sampling.generation import score_confidence
from core.sampling.loading import Loaded
from core.sampling.network import Network
from core.sampling.options import QualityMetric, SampleConfig
from core.sampling.prompt import Layout
from sample_utils import judge_scores


class Finished(NamedTuple):
    """A batch of finished texts. tokens int64 [B, L] on the model's device, texts the same decoded; layout: what they
    began with; rows: their random numbers."""

    config: SampleConfig
    loaded: Loaded
    network: Network
    layout: Layout
    rows: RowRandom
    tokens: Tensor
    texts: list[str]


class MetricRow(NamedTuple):
    """score: a number for each text of a batch; title: what the report calls it; unit: after the number; remark: in
    brackets after the mean; key: of the scores in the file of --save_json."""

    score: Callable[[Finished], list[float]]
    title: str
    key: str
    unit: str = ''
    remark: Callable[[SampleConfig, Loaded], str] = lambda config, loaded: ''


def own_confidence(made: Finished) -> list[float]:
    """Mean log-probability in nats of the tokens that were written."""
    scored = score_confidence(made.network, made.tokens, made.layout.protected, made.loaded.settings.rule.allowed,
                              made.rows, made.config.confidence_groups, made.loaded.settings.block_length)
    return (scored.total / scored.count.clamp(min=1)).tolist()


def _way_of_confidence(config: SampleConfig, loaded: Loaded) -> str:
    return ' (left to right)' if loaded.model.config.attention_type == 'causal' else \
        f' (masked pseudo-likelihood in {counted(config.confidence_groups, "group")})'


def judged(made: Finished) -> list[float]:
    """1 - the judge's evaluation, of each text. UserError where these are no numbers."""
    with made.network.precision(), made.network.timer.measure('judge'):
        scores = judge_scores(made.loaded.judge, made.tokens)
        found = scores.tolist()
    if bool(scores.isnan().any()):
        raise UserError("the judge's scores are not numbers (NaN); its checkpoint is damaged or its training diverged: "
                        'take an earlier one (judge_checkpoint_name), or dtype=float32')
    return found


QUALITY_METRICS: dict[str, MetricRow] = {
    QualityMetric.SELF: MetricRow(own_confidence, 'self-confidence', 'self_confidence', ' nats per token',
                                  _way_of_confidence),
    QualityMetric.JUDGE: MetricRow(judged, 'judge score', 'judge_scores',
                                   remark=lambda config, loaded: ' (1 - evaluation; 1 is real text)'),
}
