"""The kinds of model that a checkpoint can hold. core/training_kinds.py describes how each is trained."""

import shlex
from enum import StrEnum
from typing import Self

from model import ModelMode


class CheckpointKind(StrEnum):
    """What a model was trained for, one row for each kind.

    mode: what its last layer predicts. writes_text: whether it is a generator. command: trains such a model. use: the
    option of sample.py that takes its checkpoint. classes: number of classes of a classifier's output.
    """

    mode: ModelMode
    writes_text: bool
    command: str
    use: str
    classes: int

    # a diffusion model that reveals masked tokens
    UNMASKING = ('unmasking', ModelMode.LANGUAGE_MODEL, True, 'python train.py config/train_char_diffusion_sampler.py',
                 '--checkpoint_name')
    # masked diffusion inside blocks; the blocks follow each other from left to right
    BLOCK = ('block', ModelMode.LANGUAGE_MODEL, True, 'python train.py config/train_char_block.py', '--checkpoint_name')
    # logits over base vocabulary and the wrong id
    REMASKING = ('remasking', ModelMode.LANGUAGE_MODEL, False, 'python train.py config/train_char_remasking.py',
                 '--remasking_checkpoint_name')
    # the binary remasking model
    CLASSIFIER = ('classifier', ModelMode.TOKEN_CLASSIFIER, False,
                  'python train.py config/train_char_remasking.py --remasking_kind=binary',
                  '--remasking_checkpoint_name')
    # classes: a right token, or the source of a wrong one
    MULTICLASS = ('multiclass', ModelMode.TOKEN_CLASSIFIER, False,
                  'python train.py config/train_char_remasking.py --remasking_kind=multiclass '
                  '--remasking_corruption=mixed', '--remasking_checkpoint_name', 4)
    # one number per sequence
    JUDGE = ('judge', ModelMode.SEQUENCE_SCORER, False, 'python train.py config/train_char_judge.py',
             '--judge_checkpoint_name')
    # left to right
    CAUSAL = ('causal', ModelMode.LANGUAGE_MODEL, True, 'python train.py config/train_char_ar.py', '--checkpoint_name')

    def __new__(cls, name: str, mode: ModelMode, writes_text: bool, command: str, use: str, classes: int = 2) -> Self:
        kind = str.__new__(cls, name)
        kind._value_, kind.mode, kind.writes_text, kind.command, kind.use = name, mode, writes_text, command, use
        kind.classes = classes
        return kind

    @property
    def own_output(self) -> bool:
        """Whether it has an output layer apart from the embedding, which can train on a frozen trunk."""
        return self.mode is not ModelMode.LANGUAGE_MODEL

    def next_command(self, out_dir: str) -> str:
        """The command to type after a run in `out_dir` has trained such a model."""
        if self.writes_text:
            return f'python sample.py --out_dir={shlex.quote(out_dir)}'
        judged = '--quality_metric=judge ' if self is CheckpointKind.JUDGE else ''
        return f'python sample.py {judged}{self.use}={shlex.quote(f"{out_dir}/ckpt_best.pt")}'
