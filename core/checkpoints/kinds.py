"""The kinds of model that a checkpoint can hold."""

from enum import StrEnum

from model import ModelMode


class CheckpointKind(StrEnum):
    """What the model was trained for; a sampler takes a generator, not a judge."""

    UNMASKING = 'unmasking'    # a diffusion model that reveals masked tokens
    REMASKING = 'remasking'    # logits over base vocabulary and the wrong id
    CLASSIFIER = 'classifier'  # the binary remasking model
    JUDGE = 'judge'            # one number per sequence
    CAUSAL = 'causal'          # left to right


MODES = {CheckpointKind.CLASSIFIER: ModelMode.TOKEN_CLASSIFIER, CheckpointKind.JUDGE: ModelMode.SEQUENCE_SCORER}
GENERATORS = (CheckpointKind.UNMASKING, CheckpointKind.CAUSAL)  # kinds that write text
OWN_OUTPUT = tuple(MODES)  # kinds with an output layer apart from the embedding, which trains on a frozen trunk


def mode_of(kind: CheckpointKind) -> ModelMode:
    """What a model of `kind` predicts."""
    return MODES.get(kind, ModelMode.LANGUAGE_MODEL)
