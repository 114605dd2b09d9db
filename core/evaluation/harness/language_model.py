"""A model of this program as lm-evaluation-harness knows models; importing it registers the name masked_diffusion.

    import core.evaluation.harness.language_model
    lm_eval.simple_evaluate(model='masked_diffusion', model_args='out_dir=out,trunk_calls=8', tasks=['my_task'])
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from configurator import configure
from core.common.errors import UserError
from core.common.printing import say
from core.evaluation.harness.options import HarnessConfig
from core.evaluation.harness.scoring import (Scored, Writing, load_subject, log_likelihoods, numbered, pair_of,
                                             written_texts)

NAME = 'masked_diffusion'
USUAL_TOKENS = 256  # written where a task names no number, as the harness's own models have it


@register_model(NAME)
class MaskedDiffusionLM(LM):
    """A checkpoint of this program, or a masked language model in Hugging Face's form (docs/pretrained.md).

    What its numbers mean is told in core/evaluation/harness/scoring.py.
    """

    def __init__(self, **options: Any) -> None:
        """options: those of `HarnessConfig`, as --model_args gives them. UserError for any that are wrong."""
        super().__init__()
        if options.pop('max_batch_size', None) is not None:
            raise UserError('max_batch_size was given, but this model does not search for a batch size; leave it out')
        given = [f'--{name}={value}' for name, value in options.items() if value is not None]
        configuration = configure(HarnessConfig, given)
        self.config = configuration.config
        self.subject = load_subject(self.config, configuration.explicit)
        self._device = self.subject.allowed.device
        for line in self.subject.said:
            say(line)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
                            ) -> 'MaskedDiffusionLM':
        """From --model_args, which win over the harness's own options (batch_size, device)."""
        return cls(**{**(additional_config or {}), **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None
                               ) -> 'MaskedDiffusionLM':
        """The same, of a string such as 'out_dir=out,trunk_calls=8'."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats of each continuation given its context, whether each of its tokens was the most
        probable one when the policy revealed it)."""
        pairs = [pair_of(self.subject.vocabulary, *request.args) for request in requests]
        return [tuple(one) for one in self._scored('loglikelihood', requests, pairs)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each text from its first token on, in windows of the model's length after the
        first of which each sees half a window of the text before it; 0 for an empty text."""
        texts = [request.args[0] for request in requests]
        asked = [request for request, text in zip(requests, texts) if text]
        pairs = [((), self.subject.vocabulary.encode(text)) for text in texts if text]
        found = iter(self._scored('loglikelihood_rolling', asked, pairs))
        return [next(found).log_likelihood if text else 0.0 for text in texts]

    def _scored(self, name: str, requests: Sequence[Instance], pairs: Sequence[tuple]) -> list[Scored]:
        found = log_likelihoods(self.subject, numbered(pairs), say)
        for request, one in zip(requests, found):
            self.cache_hook.add_partial(name, request.args, tuple(one) if name == 'loglikelihood' else one[0])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the policy writes after each context, cut before the first stop string; greedily unless the task asks
        for a temperature."""
        found = written_texts(self.subject, [(request.args[0], writing_of(request.args[1])) for request in requests],
                              say)
        for request, text in zip(requests, found):
            self.cache_hook.add_partial('generate_until', request.args, text)
        return found

    def get_model_info(self) -> dict[str, Any]:
        """What the numbers depend on besides the task; the harness keeps it with the results."""
        config = self.config
        return {'model_source': config.model or f'{config.out_dir}/{config.checkpoint_name}', 'measure': config.measure,
                'policy': config.policy, 'trunk_calls': config.trunk_calls or 'one a token', 'seed': config.seed,
                'sampler_head': self.subject.head, **({'draws': config.draws} if config.measure == 'nelbo' else {})}


def writing_of(arguments: dict[str, Any]) -> Writing:
    """How a task wants its texts written, from its generation_kwargs. UserError for what this model cannot do."""
    known = ('until', 'max_gen_toks', 'max_new_tokens', 'max_tokens', 'temperature', 'do_sample')
    others = [name for name in arguments if name not in known]
    if others:
        raise UserError(f'generation_kwargs name {", ".join(others)}, but of them this model knows {", ".join(known)}; '
                        f'leave the others out')
    until = arguments.get('until') or ()
    temperature = float(arguments.get('temperature', 1.0 if arguments.get('do_sample') else 0.0))
    most = next((int(arguments[name]) for name in known[1:4] if name in arguments), USUAL_TOKENS)
    if most < 1 or temperature < 0:
        raise UserError(f'generation_kwargs ask for {most} tokens at temperature {temperature:g}, but at least 1 token '
                        f'at a temperature of at least 0 can be written')
    return Writing((until,) if isinstance(until, str) else tuple(until), most,
                   temperature if arguments.get('do_sample', True) else 0.0)
