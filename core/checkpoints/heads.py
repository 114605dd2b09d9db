"""When the heads of a generator train, and with what weight.

A new head needs a module of `GPT`, a row of `HEAD_ROWS`, a loss in core/objective.py and options.
"""

from model import HEAD_ROWS, GPTConfig, HeadRow


class Head(HeadRow):
    """A row of `HEAD_ROWS`, with methods that tell when the head trains."""

    @property
    def when_it_trains(self) -> list[str]:
        """The fields of `GPTConfig` that say when it trains and with what weight."""
        return [name for name in (self.starts_at, self.weight, self.grows_until) if name is not None]

    def is_in(self, config: object) -> bool:
        """Whether a model of this shape has the head. config: a `GPTConfig`, or options with its fields."""
        return vars(config)[self.added_by]

    def start(self, config: object) -> int:
        """Its first iteration; config as above."""
        return vars(config)[self.starts_at]

    def has_begun(self, config: GPTConfig, steps: int) -> bool:
        """Whether the model has the head, and at least one of the `steps` steps so far trained it."""
        return self.is_in(config) and steps > self.start(config)

    def weight_at(self, config: GPTConfig, iteration: int) -> float:
        """Weight of its loss: 0 before its first iteration `start`, then its full weight w. If the weight grows until
        an iteration `end` after `start`, it is w * min(1, (i - start + 1) / (end - start)) at iteration i."""
        start, full = self.start(config), 1.0 if self.weight is None else vars(config)[self.weight]
        if iteration < start:
            return 0.0
        end = start if self.grows_until is None else vars(config)[self.grows_until]
        return full if end <= start else full * min(1.0, (iteration - start + 1) / (end - start))

    def trained_from(self, config: GPTConfig) -> int:
        """The smallest number of steps that includes its first step, and a step with the full weight of its loss."""
        end = 0 if self.grows_until is None else vars(config)[self.grows_until]
        return max(self.start(config) + 1, end)


HEADS = tuple(Head(*row) for row in HEAD_ROWS)  # in the order of their stages
SAMPLER, CRITIC = (next(head for head in HEADS if head.name == name) for name in ('sampler', 'critic'))


def heads_of(config: GPTConfig) -> list[Head]:
    """The heads that a model of this shape has."""
    return [head for head in HEADS if head.is_in(config)]


def not_begun(head: Head, config: GPTConfig, steps: int) -> list[str]:
    """A message if the model has the head, but the head's stage had not begun after `steps` steps; otherwise none."""
    if not head.is_in(config) or head.has_begun(config, steps):
        return []
    return [f'the {head.name} head is ignored: its stage begins at iteration {head.start(config)}, the checkpoint is '
            f'of iteration {steps}']


def started_heads(config: GPTConfig, iteration: int) -> tuple[bool, bool, list[str]]:
    """Whether the sampler and the critic head had begun to train at `iteration`; messages about those that had not."""
    said = [line for head in HEADS for line in not_begun(head, config, iteration)]
    return SAMPLER.has_begun(config, iteration), CRITIC.has_begun(config, iteration), said
