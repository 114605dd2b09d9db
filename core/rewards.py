"""The rewards of texts in training by policy gradient; each is a row of `REWARDS`.

Every reward is a score in 0 .. 1 minus `repetition_weight` times the share of the text that repeats itself.

Letters: B rows, T tokens of a text.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core.checkpoints.helpers import load_judge, require_block
from core.common.precision import to_exact
from core.data.vocabulary import Vocabulary
from core.options import TrainConfig
from sample_utils import judge_scores

Reward = Callable[[Tensor], Tensor]  # texts int64 [B, T] -> float64 [B]
REPEATED = 4  # tokens of an n-gram; its repetition costs
LINE_ENDS = tuple('.,;:!?-')


class RewardRow(NamedTuple):
    """make: makes the score of texts from the options, the vocabulary and the device. problems: what is wrong with the
    options. reads: options that name the checkpoints that it reads."""

    make: Callable[[TrainConfig, Vocabulary, torch.device], Reward]
    problems: Callable[[TrainConfig], list[str]] = lambda config: []
    reads: tuple[str, ...] = ()


def repeated_share(tokens: Tensor) -> Tensor:
    """float64 [B]: the share of the n-grams (4 tokens) of each text, a row of int64 [B, T], that occurred earlier in
    the text; 0 for shorter texts. As a share it costs a long text no more than a short one."""
    if tokens.size(1) < REPEATED:
        return torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    kinds = tokens.unfold(1, REPEATED, 1).flatten(0, 1).unique(dim=0, return_inverse=True)[1]  # a number for each n-gram
    ordered = kinds.view(len(tokens), -1).sort(dim=1).values  # [B, T - 3]
    return (ordered[:, 1:] == ordered[:, :-1]).sum(1).double() / ordered.size(1)


def _judged(config: TrainConfig, vocabulary: Vocabulary, device: torch.device) -> Reward:
    """1 - the judge's estimate of the share of wrong tokens."""
    judge = load_judge(config.judge_checkpoint_name, '.', vocabulary, device)
    require_block(judge, f'judge_checkpoint_name={config.judge_checkpoint_name}', config.block_size + 1,
                  'CLS and the text of one row')
    return lambda tokens: to_exact(judge_scores(judge, tokens.to(device))).double()


def _judge_problems(config: TrainConfig) -> list[str]:
    return [] if config.judge_checkpoint_name else [
        'reward is judge, but no judge is named; add --judge_checkpoint_name=out-judge/ckpt_best.pt (trained with: '
        'python train.py config/train_char_judge.py), or take --reward=line_ends']


def line_end_share(text: str) -> float:
    """The share of the finished lines of `text` that end with a punctuation mark. Empty lines do not count; 0 if there
    are no others."""
    lines = [line for line in text.split('\n')[:-1] if line]
    return sum(line.endswith(LINE_ENDS) for line in lines) / max(1, len(lines))


def _line_ends(config: TrainConfig, vocabulary: Vocabulary, device: torch.device) -> Reward:
    return lambda tokens: torch.tensor([line_end_share(vocabulary.decode(row)) for row in tokens.tolist()],
                                       dtype=torch.float64, device=tokens.device)


REWARDS: dict[str, RewardRow] = {
    'judge': RewardRow(_judged, _judge_problems, ('judge_checkpoint_name',)),
    'line_ends': RewardRow(_line_ends),
}


def make_reward(config: TrainConfig, vocabulary: Vocabulary, device: torch.device) -> Reward:
    """The reward that the options ask for, minus the cost of repetition."""
    score = REWARDS[config.reward].make(config, vocabulary, device)
    return lambda tokens: score(tokens) - config.repetition_weight * repeated_share(tokens)
