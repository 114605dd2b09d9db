"""Sampling policies: which masked positions a step reveals and which positions it masks again.

The loop in core/sampling/generation.py calls the network, which counts its calls. A policy is a pair of functions, one
for each of these two choices. A new policy is one function that builds the pair, one row of `POLICIES` and one test of
its law. With a sampler head the policy chooses the positions, and the head draws their tokens wave by wave.
"""

from collections.abc import Callable
from typing import NamedTuple

from core.sampling.policies import adaptive, ancestral, ordered, revising
from core.sampling.policies.guides import GUIDES, GuideRow
from core.sampling.policies.interface import Counts, Open, Policy, PolicyView, Prediction
from core.sampling.policies.revising import remask_policy

__all__ = ['GUIDES', 'POLICIES', 'REMASKING', 'Counts', 'GuideRow', 'Open', 'Policy', 'PolicyRow', 'PolicyView',
           'Prediction', 'remask_policy']

REMASKING = ('start_ratio', 'end_ratio', 'schedule_type', 'masking_ratios', 'schedule_mode', 'start_threshold',
             'end_threshold', 'guidance', 'intelligent_remasking', 'randomness_strength')


class PolicyRow(NamedTuple):
    """make: builds the policy from its options by name ('remask' from levels). options: of sample.py. calls: the trunk
    calls per block of n masked positions. summary: one line. needs_critic: it does not work without a critic.
    deterministic: it chooses positions from revealed tokens and probabilities only, or from random keys that know no
    token; it never masks again and takes `iterations` trunk calls. So a text has an exact likelihood under it.
    timed: it follows the noise schedule of the model's training."""

    make: Callable[..., Policy]
    options: tuple[str, ...]
    calls: str
    summary: str
    needs_critic: bool = False
    deterministic: bool = False
    timed: bool = False


_REMDM = ('iterations', 'idle_cache')
POLICIES: dict[str, PolicyRow] = {
    'remask': PolicyRow(remask_policy, ('iterations', *REMASKING), 'at most iterations',
                        'fill all, then remask by schedule: part by chance, part by --guidance'),
    'mdlm': PolicyRow(ancestral.mdlm, ('iterations', 'idle_cache'), 'at most iterations',
                      'ancestral: each position by chance, as time says (Sahoo et al. 2024)', timed=True),
    'first_hitting': PolicyRow(ancestral.first_hitting, (), 'n',
                               'one random position per call, exact in continuous time (Zheng et al. 2024)'),
    'random': PolicyRow(ordered.random, ('iterations',), 'min(iterations, n)', 'equal shares in random order',
                        deterministic=True),
    'llada': PolicyRow(ordered.llada, ('iterations',), 'min(iterations, n)',
                       'equal shares, most probable draws first (Nie et al. 2025)'),
    'top_probability': PolicyRow(ordered.top_probability, ('iterations',), 'min(iterations, n)',
                                 'equal shares, highest maximum probability first (Kim et al. 2025)',
                                 deterministic=True),
    'margin': PolicyRow(ordered.margin, ('iterations',), 'min(iterations, n)',
                        'equal shares, largest top-1 margin first (Kim et al. 2025)', deterministic=True),
    'entropy': PolicyRow(ordered.entropy, ('iterations',), 'min(iterations, n)',
                         'equal shares, lowest entropy first (Dream, Ye et al. 2025)', deterministic=True),
    'maskgit': PolicyRow(ordered.maskgit, ('iterations', 'choice_temperature'), 'min(iterations, n)',
                         'cosine shares, most probable draws first, annealed noise (Chang et al. 2022)'),
    'remdm_cap': PolicyRow(ancestral.remdm_cap, (*_REMDM, 'remdm_eta'), 'at most iterations',
                           'ancestral with remasking, capped rate (Wang et al. 2025)', timed=True),
    'remdm_rescale': PolicyRow(ancestral.remdm_rescale, (*_REMDM, 'remdm_eta'), 'at most iterations',
                               'ancestral with remasking, a share of the largest rate (Wang et al. 2025)', timed=True),
    'remdm_conf': PolicyRow(ancestral.remdm_conf, _REMDM, 'at most iterations',
                            'ancestral with remasking of what was improbable when drawn (Wang et al. 2025)',
                            timed=True),
    'remdm_loop': PolicyRow(ancestral.remdm_loop, (*_REMDM, 'remdm_eta', 'loop_on', 'loop_off', 'loop_alpha'),
                            'at most iterations', 'ancestral, with a loop of renewal in between (Wang et al. 2025)',
                            timed=True),
    'p2_self': PolicyRow(revising.p2_self, ('iterations', 'planner_eta'), 'iterations',
                         'path planning: the best tokens stay, by the denoiser (Peng et al. 2025)'),
    'p2_critic': PolicyRow(revising.p2_critic, ('iterations', 'planner_eta'), 'iterations',
                           'path planning by the critic (Peng et al. 2025)', needs_critic=True),
    'entropy_bounded': PolicyRow(adaptive.entropy_bounded, ('entropy_bound',), 'at most n',
                                 'groups of bounded entropy (EB, Ben-Hamu et al. 2025)'),
    'fast_dllm_threshold': PolicyRow(adaptive.fast_dllm_threshold, ('confidence_threshold',), 'at most n',
                                     'whatever is probable enough (Fast-dLLM, Wu et al. 2025)'),
    'fast_dllm_factor': PolicyRow(adaptive.fast_dllm_factor, ('parallel_factor',), 'at most n',
                                  'more at once the more probable they are (Fast-dLLM, Wu et al. 2025)'),
    'token_critic': PolicyRow(revising.token_critic, ('iterations', 'selection_noise'), 'iterations',
                              'cosine shares, what the critic trusts stays (Lezama et al. 2022)', needs_critic=True),
    'dilated': PolicyRow(ordered.dilated, (), 'ceil(log2 n)',
                         'groups at halving distances, never adjacent (DUS, Luxembourg et al. 2025)'),
    'strided': PolicyRow(ordered.strided, ('iterations',), 'min(iterations, n)',
                         'equal groups of every K-th position, never adjacent (after DUS)', deterministic=True),
    'left_to_right': PolicyRow(ordered.left_to_right, ('iterations',), 'min(iterations, n)',
                               'equal shares from left to right', deterministic=True),
}
