"""What every sampling policy must do, enumerated: an exact oracle in place of the network, and laws written a second
time in plain Python from the papers' equations, on sequences of 4 tokens out of 3.

A state is a tuple of 4 pairs (token, probability it had when drawn); a law is a dict from states to probabilities.
Where no later step reads those probabilities they are forgotten, to keep the laws small.
"""

import math
from functools import cache
from itertools import combinations, permutations, product

import torch
from torch import nn

from core.sampler_head import SamplerWindow
from model import GPTConfig

T, V0 = 4, 3
MASK, V = V0, V0 + 4
EMPTY = ((MASK, 1.0),) * T


class Head(nn.Module):
    """A sampler head whose logits are the trunk's, plus a number for each neighbour that is revealed."""

    window, gate, attention = SamplerWindow(1, 1), None, None

    def __init__(self, generator):
        super().__init__()
        self.tables = torch.randn(2, V, V, generator=generator, dtype=torch.float64)

    def neighbour_tables(self, embedding):
        return self.tables

    def hidden_projection(self, hidden):
        return hidden

    def later_layers(self, output_weight):
        return self

    def logits(self, projection, trunk_logits, new):
        return projection


class Oracle(nn.Module):
    """Exact conditionals of a random joint distribution: `hidden states` are logits, `lm_head` is the identity.

    Logits of revealed positions and of special ids are large nonsense, so that nobody may read them.
    """

    def __init__(self, seed=188, sharpness=1.2):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.joint = (sharpness * torch.randn(V0 ** T, generator=generator, dtype=torch.float64)).softmax(0)
        self.config = GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=1, n_embd=8, mask_token_id=MASK)
        self.lm_head = nn.Linear(V, V, bias=False, dtype=torch.float64)
        self.lm_head.weight = nn.Parameter(torch.eye(V, dtype=torch.float64), requires_grad=False)
        self.sampler_head = Head(generator)
        table = 9 * torch.randn((V0 + 1) ** T, T, V, generator=generator, dtype=torch.float64)
        for index, tokens in enumerate(product(range(V0 + 1), repeat=T)):
            for position in range(T):
                if tokens[position] == MASK:
                    table[index, position, :V0] = torch.tensor(self.exact(tokens, position)).log()
        self.table = table
        self.wrongness = torch.rand((V0 + 1) ** T, T, generator=generator, dtype=torch.float64)
        self.weight = torch.tensor([(V0 + 1) ** (T - 1 - position) for position in range(T)])

    def exact(self, tokens, position):
        """p(token at position | revealed tokens), from the joint."""
        weights = [0.0] * V0
        for outcome, probability in zip(product(range(V0), repeat=T), self.joint.tolist()):
            if all(seen in (MASK, token) for seen, token in zip(tokens, outcome)):
                weights[outcome[position]] += probability
        return [weight / sum(weights) for weight in weights]

    def encode(self, tokens, *, cache=None, positions=None):
        hidden = self.table[(tokens * self.weight).sum(1)]
        return hidden if positions is None else hidden.flatten(0, 1)[positions]

    def critic_scores(self, tokens):
        return self.wrongness[(tokens * self.weight).sum(1)]

    def neighbour_embedding(self):
        return torch.zeros(V, 1, dtype=torch.float64)


ORACLE = Oracle()
_LOGITS = ORACLE.table.tolist()


def _number(tokens):
    return sum(token * (V0 + 1) ** (T - 1 - position) for position, token in enumerate(tokens))


def conditionals(state):
    """Probabilities of the V0 tokens at each masked position."""
    return _conditionals(tuple(token for token, _ in state))


@cache
def _conditionals(tokens):
    found = {}
    for position in (position for position, token in enumerate(tokens) if token == MASK):
        logits = _LOGITS[_number(tokens)][position][:V0]
        found[position] = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
    return found


def masked(state, mine=range(T)):
    return [position for position in mine if state[position][0] == MASK]


def draws(state, positions):
    """Every way to fill `positions`, each independently: (state, probability)."""
    exact = conditionals(state)
    for tokens in product(range(V0), repeat=len(positions)):
        filled, weight = list(state), 1.0
        for position, token in zip(positions, tokens):
            filled[position] = (token, exact[position][token])
            weight *= exact[position][token]
        yield tuple(filled), weight


def waves(state, positions):
    """Every way to fill `positions` through the sampler head, as the group rule and the wavefront say."""
    order = _stages(state, positions)
    logits = _LOGITS[_number([token for token, _ in state])]

    def fill(current, left):
        if not left:
            yield current, 1.0
            return
        stage, position = left[0]
        values = list(logits[position][:V0])
        if stage > 1:
            for slot, beside in ((0, position - 1), (1, position + 1)):
                if 0 <= beside < T and current[beside][0] != MASK:
                    table = ORACLE.sampler_head.tables[slot, current[beside][0]].tolist()
                    values = [value + table[token] for token, value in enumerate(values)]
        total = sum(map(math.exp, values))
        for token, value in enumerate(values):
            weight = math.exp(value) / total
            filled = (*current[:position], (token, weight), *current[position + 1:])
            for result, rest in fill(filled, left[1:]):
                yield result, weight * rest

    yield from fill(state, sorted(order))


def _stages(state, positions):
    """(stage, position) pairs; stage 1 is drawn from the trunk."""
    shown = [position for position in range(T) if state[position][0] != MASK]
    if positions != masked(state):  # a group: in each run of neighbours the middle first
        runs, found = [], []
        for position in positions:
            if runs and runs[-1][-1] == position - 1:
                runs[-1].append(position)
            else:
                runs.append([position])
        for run in runs:
            middle = (run[0] + run[-1]) // 2
            found += [(abs(position - middle) + 1, position) for position in run]
        return found
    if not shown:
        exact = conditionals(state)
        seed = max(positions, key=lambda position: max(exact[position]))
        return [(1, seed), *((1 + abs(position - seed), position) for position in positions if position != seed)]
    found = []
    for position in positions:
        left = min((position - seen for seen in shown if seen < position), default=99)
        right = min((seen - position for seen in shown if seen > position), default=99)
        found.append((1 + min(left, right + (right == left - 1)), position))
    return found


def advance(law, step, memory=False):
    """The law after one step; `step` maps a state to (state, probability) pairs."""
    after = {}
    for state, probability in law.items():
        for result, weight in step(state):
            if weight > 0:
                result = tuple((token, round(chance, 12) if memory else 1.0) for token, chance in result)
                after[result] = after.get(result, 0.0) + probability * weight
    return after


def tokens_of(law, size=V0):
    """float64 [size ** T]: the probability of every sequence."""
    found = torch.zeros(size ** T, dtype=torch.float64)
    for state, probability in law.items():
        found[sum(token * size ** (T - 1 - position) for position, (token, _) in enumerate(state))] += probability
    return found


def subsets(chances):
    """Every set of independent events with its probability; chances: dict from event to probability."""
    for chosen in product((False, True), repeat=len(chances)):
        weight = math.prod(chance if taken else 1 - chance for taken, chance in zip(chosen, chances.values()))
        yield [event for taken, event in zip(chosen, chances) if taken], weight


REMEMBERING = set()  # the policies whose later steps read the probabilities of earlier draws


def remembering(step_of):
    REMEMBERING.add(step_of)
    return step_of


# Policies: a function of the number of steps (and options) gives one law step per step -------------------------------

def _share(n, step, steps):
    return -(-n // (steps - step))


def _all_sets(candidates, count):
    sets = list(combinations(candidates, count))
    return [(list(chosen), 1 / len(sets)) for chosen in sets]


def by_position(choose, fill=draws):
    """Steps whose positions depend on the state alone: choose(state, mine, step) gives (positions, probability)."""
    def step_of(step, mine):
        def step_law(state):
            for positions, chance in choose(state, masked(state, mine), step):
                for result, weight in fill(state, positions):
                    yield result, chance * weight
        return step_law
    return step_of


def by_candidate(choose):
    """Steps that draw all masked positions first: choose(confidence by position, size, step) gives sets to keep."""
    def step_of(step, mine):
        def step_law(state):
            open_positions = masked(state, mine)
            for filled, weight in draws(state, open_positions):
                for kept, chance in choose({position: filled[position][1] for position in open_positions},
                                           len(mine), step):
                    yield tuple(filled[position] if position in kept or position not in open_positions else
                                state[position] for position in range(T)), weight * chance
        return step_law
    return step_of


def _best(scores, count):
    return sorted(scores, key=lambda position: -scores[position])[:count]


def mdlm(steps, fill=draws):
    return by_position(lambda state, free, step: subsets(dict.fromkeys(free, 1 / (steps - step))), fill)


def random(steps, fill=draws):
    return by_position(lambda state, free, step: _all_sets(free, _share(len(free), step, steps)), fill)


def first_hitting():
    return by_position(lambda state, free, step: _all_sets(free, min(1, len(free))))


def left_to_right(steps):
    return by_position(lambda state, free, step: [(free[:_share(len(free), step, steps)], 1.0)])


def dilated():
    """Four positions in two calls: the first and the third, then the others."""
    return by_position(lambda state, free, step: [([position for position in free if step or position % 2 == 0], 1.0)])


def _entropy(probabilities):
    return -sum(chance * math.log(chance) for chance in probabilities)


def strided(steps):
    """Four positions: every third of them (0 and 3, then 2, then 1) in three calls, every second in two."""
    groups = {2: [[0, 2], [1, 3]], 3: [[0, 3], [2], [1]], 4: [[0], [2], [1], [3]]}[steps]
    return by_position(lambda state, free, step: [(groups[step], 1.0)])


def top_probability(steps):
    def choose(state, free, step):
        highest = {position: max(chances) for position, chances in conditionals(state).items()}
        return [(_best({position: highest[position] for position in free}, _share(len(free), step, steps)), 1.0)]
    return by_position(choose)


def margin(steps):
    def choose(state, free, step):
        best = {position: sorted(chances)[-2:] for position, chances in conditionals(state).items()}
        gaps = {position: first - second for position, (second, first) in best.items()}
        return [(_best({position: gaps[position] for position in free}, _share(len(free), step, steps)), 1.0)]
    return by_position(choose)


def entropy(steps):
    def choose(state, free, step):
        certain = {position: -_entropy(conditionals(state)[position]) for position in free}
        return [(_best(certain, _share(len(free), step, steps)), 1.0)]
    return by_position(choose)


def entropy_bounded(bound):
    def choose(state, free, step):
        values = {position: _entropy(conditionals(state)[position]) for position in free}
        order = sorted(values, key=values.get)
        fitting = [size for size in range(1, len(order) + 1)
                   if sum(values[position] for position in order[:size]) - values[order[size - 1]] <= bound]
        return [(order[:max(fitting, default=0)], 1.0)]
    return by_position(choose)


def llada(steps):
    return by_candidate(lambda sure, size, step: [(_best(sure, _share(len(sure), step, steps)), 1.0)])


def fast_dllm_threshold(threshold):
    return by_candidate(lambda sure, size, step: [
        ({*_best(sure, 1), *(position for position in sure if sure[position] >= threshold)}, 1.0)])


def fast_dllm_factor(factor):
    def choose(sure, size, step):
        order = _best(sure, len(sure))
        fitting = [n for n in range(1, len(order) + 1) if (n + 1) * (1 - sure[order[n - 1]]) < factor]
        return [(order[:max(fitting, default=1)], 1.0)]
    return by_candidate(choose)


def maskgit(steps, temperature):
    """Gumbel noise of scale s on log p picks a set as drawing without replacement by p ** (1 / s) does."""
    def choose(sure, size, step):
        ratio = (step + 1) / steps
        stay = max(min(math.floor(size * math.cos(math.pi / 2 * ratio) + 1e-9), len(sure) - 1), steps - 1 - step)
        count, scale = len(sure) - stay, temperature * (1 - ratio)
        if stay == 0:
            return [(list(sure), 1.0)]
        if scale == 0:
            return [(_best(sure, count), 1.0)]
        found = []
        for order in permutations(sure, count):
            left, chance = {position: value ** (1 / scale) for position, value in sure.items()}, 1.0
            for position in order:
                chance *= left[position] / sum(left.values())
                del left[position]
            found.append((order, chance))
        return found
    return by_candidate(choose)


def remdm(steps, alpha=lambda t: 1 - t, sigma=None):
    """sigma(state, mine, t, largest): the chance of each revealed position to be masked again."""
    def step_of(step, mine):
        t = 1 - step / steps
        alpha_t, alpha_s = alpha(t), 1.0 if step == steps - 1 else alpha(1 - (step + 1) / steps)
        largest = min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 1.0

        def step_law(state):
            again = sigma(state, mine, t, largest)
            own = again[None] if None in again else 0.0
            free = dict.fromkeys(masked(state, mine), (alpha_s - (1 - own) * alpha_t) / (1 - alpha_t))
            old = {position: again.get(position, own) for position in mine if state[position][0] != MASK}
            for shown, chance in subsets(free):
                for hidden, other in subsets(old):
                    for filled, weight in draws(state, shown):
                        yield tuple((MASK, 1.0) if position in hidden else filled[position]
                                    for position in range(T)), weight * chance * other
        return step_law
    return step_of


def remdm_cap(steps, eta):
    return remdm(steps, sigma=lambda state, mine, t, largest: {None: min(eta, largest)})


def remdm_rescale(steps, eta):
    return remdm(steps, sigma=lambda state, mine, t, largest: {None: eta * largest})


def remdm_conf(steps):
    def sigma(state, mine, t, largest):
        weights = {position: math.exp(-state[position][1]) for position in mine if state[position][0] != MASK}
        return {position: largest * weight / sum(weights.values()) for position, weight in weights.items()}
    return remembering(remdm(steps, sigma=sigma))


def remdm_loop(steps, eta, on, off, held):
    def alpha(t):
        if t > on:
            return held * (1 - t) / (1 - on)
        return held if t >= off else 1 - t * (1 - held) / off
    return remdm(steps, alpha, lambda state, mine, t, largest: {None: min(eta, largest) if off < t <= on else 0.0})


def revised(steps, hide):
    """Steps that fill all and mask again: hide(filled, state, mine, step) gives (positions, probability)."""
    def step_of(step, mine):
        def step_law(state):
            for filled, weight in draws(state, masked(state, mine)):
                for hidden, chance in [((), 1.0)] if step == steps - 1 else hide(filled, state, mine, step):
                    yield tuple((MASK, 1.0) if position in hidden else filled[position]
                                for position in range(T)), weight * chance
        return step_law
    return step_of


def wrongness(filled):
    return ORACLE.wrongness[_number([token for token, _ in filled])].tolist()


def p2(steps, eta, critic):
    def hide(filled, state, mine, step):
        scores = {}
        for position in mine:
            scores[position] = math.log(filled[position][1])
            if state[position][0] != MASK:
                worth = math.log(1 - wrongness(filled)[position]) if critic else scores[position]
                scores[position] = eta * worth
        keep = len(mine) - (len(mine) * (steps - 1 - step)) // steps
        return [(set(mine) - set(_best(scores, keep)), 1.0)]
    return remembering(revised(steps, hide))


def token_critic(steps, noise):
    """The chance that exactly these positions are the most wrong, by integrating over the least of them."""
    def hide(filled, state, mine, step):
        ratio = (step + 1) / steps
        count = math.ceil(len(mine) * math.cos(math.pi / 2 * ratio) - 1e-9)
        width, wrong = noise * (1 - ratio), torch.tensor([wrongness(filled)[position] for position in mine])
        grid = torch.linspace(-noise, 1 + noise, 4001, dtype=torch.float64)
        below = ((grid[:, None] - wrong) / width + 0.5).clamp(0, 1)  # [grid, position]
        found = []
        for chosen in combinations(range(len(mine)), count):
            others = [place for place in range(len(mine)) if place not in chosen]
            above = (1 - below[:, list(chosen)]).prod(1)  # all chosen lie above
            most = below[:, others].prod(1)  # all others lie below
            chance = float(((most[1:] + most[:-1]) / 2 * (above[:-1] - above[1:])).sum())
            found.append(([mine[place] for place in chosen], chance))
        return found
    return revised(steps, hide)


def remask(levels, mode, randomness, guidance):
    """guidance: 'critic', 'self' or None; a row that was not masked again before is finished."""
    def hide(filled, state, mine, step):
        if not masked(state, mine):
            return [((), 1.0)]
        wrong = {position: wrongness(filled)[position] if guidance == 'critic' else 1 - filled[position][1]
                 for position in mine}
        if mode == 'threshold':
            return [([position for position in mine if wrong[position] > levels[step]], 1.0)]
        count = math.floor(len(mine) * levels[step] + 0.5)
        if guidance is None:
            return _all_sets(mine, count)
        drawn = math.floor(count * randomness + 0.5)
        guided = _best(wrong, count - drawn)
        return [([*guided, *rest], chance) for rest, chance in
                _all_sets([position for position in mine if position not in guided], drawn)]
    return remembering(revised(len(levels) + 1, hide))


def law_of(step_of, steps, block_length=T):
    """The law of the finished sequence: `steps` steps in each block."""
    return laws_of(step_of, steps, block_length)[-1]


def laws_of(step_of, steps, block_length=T):
    """The law of the state after each step."""
    memory = step_of in REMEMBERING
    found = [{EMPTY: 1.0}]
    for start in range(0, T, block_length):
        mine = range(start, min(T, start + block_length))
        for step in range(steps):
            found.append(advance(found[-1], step_of(step, mine), memory and step < steps - 1))
    return found[1:]
