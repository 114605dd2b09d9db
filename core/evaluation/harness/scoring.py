"""What lm-evaluation-harness asks of a model, answered for models that fill masks; it needs no package of the harness.

A request is a text of which a part is given and a part is to be scored or written. `log_likelihoods` gives one of two
numbers:

- likelihood: log p(continuation | context), exactly, of the sampler that reveals the continuation by a named policy in
  a named number of trunk calls at temperature 1 (core/sampling/path_likelihood.py). The context is protected and the
  order fixed, so nothing is estimated.
- nelbo: the evidence lower bound, the negative of the NELBO (Sahoo et al. 2024, MDLM, eq. 11; with the times integrated
  out Ou et al. 2024, RADD, eq. 9): the mean log-likelihood over all orders at one position a call, which is at most the
  log-likelihood of a sampler that takes a random one of them. It is estimated as LLaDA does it for a text given its
  prompt (Nie et al. 2025, arXiv 2502.09992, eq. 6): with n tokens, l uniform in 1 .. n and l random ones masked, the
  mean over the draws of (n / l) times the sum of their log-probabilities. Here the draws are stratified over l.

Each request has random numbers of its own, which follow from the seed and its tokens, so no number depends on the
batch, the order of requests or the other requests.

Letters: B rows of a batch, L tokens of a text.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from configurator import bound_problems
from core.checkpoints.kinds import CheckpointKind
from core.common.drawing import DrawRule
from core.common.errors import UserError, raise_problems
from core.common.precision import exact_device
from core.common.progress import ProgressBar
from core.common.randomness import RowRandom, keyed
from core.common.runtime import DTYPES, resolve_device
from core.common.timing import TimingAccumulator
from core.evaluation.harness.options import HarnessConfig
from core.evaluation.likelihood import policy_problems
from core.noise import draw_exact_mask, stratified_mask_counts
from core.pretrained.loading import pretrained_problems
from core.pretrained.vocabulary import AnyVocabulary
from core.sampling.generation import GenerationSettings, generate, reads_blocks
from core.sampling.loading import open_model
from core.sampling.network import Network
from core.sampling.options import SampleConfig
from core.sampling.path_likelihood import Scorer, path_of_text
from core.sampling.policies import POLICIES, Policy
from core.sampling.policy_options import make_policy
from core.sampling.prompt import Layout
from core.validation import masked_sums
from model import GPT
from sample_utils import Head

SHARED = ('out_dir', 'checkpoint_name', 'model', 'sampler_head', 'predicts', 'mask_token', 'trust_remote_code',
          'device', 'dtype')  # with the options of sample.py


class Request(NamedTuple):
    """given: tokens that are read; asked: tokens that are scored, or masks that are filled. number: in 0 .. 2^32 - 1,
    its own random numbers."""

    given: tuple[int, ...]
    asked: tuple[int, ...]
    number: int

    @property
    def length(self) -> int:
        """L."""
        return len(self.given) + len(self.asked)


class Scored(NamedTuple):
    """log_likelihood in nats; greedy: whether each token was the most probable one when it was revealed."""

    log_likelihood: float
    greedy: bool


class Writing(NamedTuple):
    """How texts are written: until any of the stop strings `until`, at most `most` tokens."""

    until: tuple[str, ...]
    most: int
    temperature: float


@dataclass(frozen=True)
class Subject:
    """A model ready to answer. block_length: of a block model that writes in blocks, None for whole windows; head: who
    fills; said: what is to be said about it."""

    config: HarnessConfig
    model: GPT
    vocabulary: AnyVocabulary
    allowed: Tensor
    head: Head
    block_length: int | None
    said: list[str]

    def scorer(self, width: int) -> Scorer:
        """How texts in windows or blocks of `width` tokens are scored."""
        return Scorer(self.policy(width), self.head, self.allowed, self.block_length)

    def policy(self, width: int) -> Policy:
        """The policy that is followed in windows or blocks of `width` tokens."""
        named = {'iterations': self.config.trunk_calls or width} \
            if 'iterations' in POLICIES[self.config.policy].options else {}
        return make_policy(self.config.policy, **named)

    def width(self, length: int) -> int:
        """Tokens of the longest window or block of a text of `length`."""
        return self.block_length or min(length, self.model.config.block_size)

    def network(self) -> Network:
        """The model in the asked precision."""
        dtype = DTYPES[self.config.dtype]
        return Network(self.model, TimingAccumulator(), None if dtype is torch.float32 else dtype)


def load_subject(config: HarnessConfig, explicit: Mapping[str, str]) -> Subject:
    """The model that the options name. UserError for one that fills no masks, and for options that do not go together.
    """
    problems = [*bound_problems(config), *pretrained_problems(config, explicit)]
    if config.policy not in POLICIES:
        problems += policy_problems([config.policy])
    problems += [f'{name} was given, but measure={config.measure} does not ask for it; leave it out'
                 for name in ('draws',) if name in explicit and config.measure != 'nelbo']
    raise_problems(problems)
    device = torch.device(resolve_device(config.device))
    opened = open_model(SampleConfig(**{name: getattr(config, name) for name in SHARED}), explicit, device)
    if opened.kind not in (CheckpointKind.UNMASKING, CheckpointKind.BLOCK):
        raise UserError(f'{config.checkpoint_name} is a checkpoint of kind {opened.kind}, which fills no masks; give '
                        f'a diffusion checkpoint')
    length = _block_length(config, opened.config.block_length)
    if config.measure == 'nelbo' and length is not None and reads_blocks(opened.config, length):
        raise UserError('measure is nelbo, which is estimated over whole windows, but the model writes in blocks; take '
                        'measure=likelihood')
    through_head = opened.sampler and config.use_sampler_head
    return Subject(config, opened.build(), opened.vocabulary, opened.allowed,
                   opened.config.sampler_order if through_head else 'none',
                   length if reads_blocks(opened.config, length) else None, [*opened.said, *opened.untrained])


def _block_length(config: HarnessConfig, lengths: Sequence[int]) -> int | None:
    """The block length of a block model, None for another one."""
    if config.block_length is None:
        return max(lengths, default=None)
    if config.block_length not in lengths:
        raise UserError(f'block_length is {config.block_length}, but the model has '
                        + (f'blocks of {", ".join(map(str, lengths))}; take one of them' if lengths else
                           'no blocks; leave it out'))
    return config.block_length


# From texts to requests -----------------------------------------------------------------------------------------------

def pair_of(vocabulary: AnyVocabulary, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a context and of its continuation.

    Where tokens are longer than characters, both are cut into tokens together, the spaces at the context's end with the
    continuation, as the harness does it; where that would change the context's own tokens, apart.
    """
    if vocabulary.kind != 'characters':
        bare = context.rstrip()
        context, continuation = bare, context[len(bare):] + continuation
        given, whole = vocabulary.encode(context), vocabulary.encode(context + continuation)
        if whole[:len(given)] == given and len(whole) > len(given):
            return given, whole[len(given):]
    return vocabulary.encode(context) if context else [], vocabulary.encode(continuation)


def numbered(seed_texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Request]:
    """Requests with numbers that follow from their tokens; equal ones get others the second time."""
    seen: Counter = Counter()
    found = []
    for given, asked in seed_texts:
        key = (tuple(given), tuple(asked))
        digest = hashlib.sha256(repr((key, seen[key])).encode()).digest()
        seen[key] += 1
        found.append(Request(*key, int.from_bytes(digest[:4], 'big')))
    return found


def fitted(subject: Subject, requests: Sequence[Request]) -> tuple[list[Request], str | None]:
    """The requests, with contexts cut at their start to fit a window, as the harness cuts them; and a line about that.

    A continuation that is too long by itself is scored in windows, and a block model reads any length, so these are not
    cut.
    """
    most, cut, found = subject.model.config.block_size, [], []
    for request in requests:
        beyond = request.length - most
        if subject.block_length is None and beyond > 0 and len(request.asked) <= most:
            cut.append(beyond)
            request = request._replace(given=request.given[beyond:])
        found.append(request)
    return found, None if not cut else (
        f'{len(cut)} of {len(requests)} texts are longer than the {most} tokens that the model reads at once; the '
        f'first tokens of their contexts, at most {max(cut)}, are left out')


# Answers --------------------------------------------------------------------------------------------------------------

def log_likelihoods(subject: Subject, requests: Sequence[Request], say: Callable[[str], None]) -> list[Scored]:
    """What each request's asked tokens are worth given the others (see the head of this file), in order.

    UserError under a policy without an exact likelihood, and for an empty continuation.
    """
    raise_problems(policy_problems([subject.config.policy]))
    empty = [place for place, request in enumerate(requests) if not request.asked]
    if empty:
        raise UserError(f'{len(empty)} of {len(requests)} requests have an empty continuation, the first of them '
                        f'number {empty[0]}, and nothing has no likelihood; look at the answers of the task '
                        f'(doc_to_choice, doc_to_target)')
    requests, cut = fitted(subject, requests)
    if cut is not None:
        say(cut)
    exact = _in_batches(subject, requests, say, lambda rows: _exact(subject, rows))
    if subject.config.measure == 'likelihood':
        return exact
    long = [request for request in requests if request.length > subject.model.config.block_size]
    if long:
        raise UserError(f'measure is nelbo, but {len(long)} of {len(requests)} texts have more tokens to score than '
                        f'the {subject.model.config.block_size} that the model reads at once; take measure=likelihood, '
                        f'which goes in windows')
    return [scored._replace(log_likelihood=-_bound(subject, request)) for scored, request in zip(exact, requests)]


def _in_batches(subject: Subject, requests: Sequence[Request], say: Callable[[str], None],
                answer: Callable[[list[Request]], Sequence]) -> list:
    """What `answer` gives the requests, batches of one length at a time, the longest first, back in order."""
    found: dict[int, object] = {}
    with ProgressBar(len(requests), tell=say, desc='requests') as bar:
        for places in _batches([request.length for request in requests], subject.config.batch_size):
            found |= zip(places, answer([requests[place] for place in places]))
            bar.move(len(places))
    return [found[place] for place in range(len(requests))]


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of `lengths`, at most `size` of one length at a time."""
    for length in sorted(set(lengths), reverse=True):
        places = [place for place, one in enumerate(lengths) if one == length]
        for first in range(0, len(places), size):
            yield places[first:first + size]


def _layout(subject: Subject, requests: Sequence[Request]) -> tuple[Layout, RowRandom]:
    """The texts of requests of one length, their given parts protected, and their random numbers."""
    device = exact_device(subject.allowed.device)
    tokens = torch.tensor([[*request.given, *request.asked] for request in requests], device=device)  # [B, L]
    given = torch.tensor([len(request.given) for request in requests], device=device)
    protected = torch.arange(tokens.size(1), device=device) < given[:, None]
    rows = torch.tensor([request.number for request in requests], device=device)
    return Layout(tokens, protected), RowRandom(subject.config.seed, 0, rows)


def _exact(subject: Subject, requests: Sequence[Request]) -> list[Scored]:
    """One pass along the policy's path gives both: temperature 0 tells the most probable tokens."""
    text, generator = _layout(subject, requests)
    path = path_of_text(subject.network(), text, subject.scorer(subject.width(text.tokens.size(1))), generator,
                        DrawRule(subject.allowed, temperature=0))
    return [Scored(*pair) for pair in zip(path.confidence.sum(1).tolist(),
                                          (path.log_probabilities == 0).all(1).tolist())]


def _bound(subject: Subject, request: Request) -> float:
    """The negative evidence lower bound of one request's asked tokens, in nats, from the asked number of draws."""
    draws, n, network = subject.config.draws, len(request.asked), subject.network()
    device = exact_device(subject.allowed.device)
    text = torch.tensor([*request.given, *request.asked], device=device)  # [L]
    total = 0.0
    for first in range(0, draws, subject.config.batch_size):
        generator = keyed(subject.config.seed, request.number, first, min(subject.config.batch_size, draws - first),
                          device)
        counts = stratified_mask_counts(generator, draws, n)  # [B]
        mask = draw_exact_mask(generator, counts, n)  # [B, n]
        mask = torch.cat((mask.new_zeros(len(mask), len(request.given)), mask), dim=1)  # [B, L]
        rows, mask = (one.to(subject.allowed.device) for one in (text.expand(len(mask), -1), mask))
        with network.precision():
            sums, _ = masked_sums(subject.model, rows, mask, subject.allowed)  # [B]
        total += (sums * (n / counts).to(sums.device)).sum().item()
    return total / draws


# Writing --------------------------------------------------------------------------------------------------------------

def written_texts(subject: Subject, contexts: Sequence[tuple[str, Writing]], say: Callable[[str], None]) -> list[str]:
    """The continuation of each context: `most` masked positions after it, filled by the policy, cut before the first
    stop string. What comes after it was written too, since masks are filled in any order."""
    vocabulary = subject.vocabulary
    found: dict[int, str] = {}
    for writing in dict.fromkeys(writing for _, writing in contexts):
        places = [place for place, (_, one) in enumerate(contexts) if one == writing]
        mask = (vocabulary.mask_token_id,) * writing.most
        requests = numbered([(vocabulary.encode(contexts[place][0]) if contexts[place][0] else (), mask)
                             for place in places])
        texts = _in_batches(subject, requests, say, lambda rows: _written(subject, rows, writing.temperature))
        found |= {place: cut_at(text, writing.until) for place, text in zip(places, texts)}
    return [found[place] for place in range(len(contexts))]


def _written(subject: Subject, requests: Sequence[Request], temperature: float) -> list[str]:
    """The texts of the asked positions of requests of one length."""
    (tokens, protected), generator = _layout(subject, requests)
    settings = GenerationSettings('diffusion', DrawRule(subject.allowed, temperature),
                                  subject.policy(subject.width(tokens.size(1))), head=subject.head,
                                  block_length=subject.block_length)
    made = generate(subject.network(), Layout(tokens, protected), settings, generator).tokens.tolist()
    return [subject.vocabulary.decode(row[len(request.given):]) for row, request in zip(made, requests)]


def cut_at(text: str, until: Sequence[str]) -> str:
    """`text` before the first place where any of `until` begins."""
    return text[:min((place for place in map(text.find, filter(None, until)) if place >= 0), default=len(text))]
