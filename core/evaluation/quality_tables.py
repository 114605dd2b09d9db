"""Reports of the measures of samples: Markdown tables, pictures, and the small records that docs keep.

A row is a cell's settings and result in one dict, as core/evaluation/quality.py makes it. A control has its name under
'control'; every other row has a name under 'policy'. All figures come from rows, so a kept record gives the same page.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.common.files import write_whole
from core.common.tables import markdown_table, split_at_markers, write_between
from core.evaluation.measure import Evaluation, Result
from core.evaluation.options import EvaluateConfig
from core.evaluation.quality_plots import Curve, plot_curves, plot_quality
from core.evaluation.written_samples import at_entropy
from core.sampling.policies import POLICIES

REAL, CAUSAL = 'real text', 'causal model'  # the controls that others are compared with
SAMPLE = 56  # characters of a sample in a table
PAGE = 'docs/results/policies.md'
QUALITY_COLUMNS = ('reference_bits', 'entropy_1', 'entropy_3', 'entropy_5', 'divergence_1', 'divergence_3',
                   'distinct_3', 'known_words', 'copied_span', 'repetition')
COSTS = ('trunk_calls', 'network_calls', 'seconds')
KEPT = ('control', 'policy', 'wanted_calls', 'options', 'temperature', 'trunk_calls', 'network_calls', 'seconds',
        'self_confidence', 'reference_bits', 'entropy_3', 'known_words', 'copied_span', 'repetition', 'sample')
COMMON = ('dataset', 'split', 'samples', 'length', 'batch_size', 'seed', 'sampler_head', 'critic', 'dtype')
CURVE_COLUMNS = (*COMMON, *(name for name in KEPT if name not in ('self_confidence', 'sample')), 'guidance',
                 'reference_bits_interval')

Row = Mapping[str, Any]


# Words --------------------------------------------------------------------------------------------------------------

def name_of(row: Row) -> str:
    """The name of a row in a table: a control's name, or the policy with the option that set its calls."""
    if 'control' in row:
        return row['control']
    return policy_of(row) + ''.join(f', {option} {value:.3g}' for option, value in row['options'].items()
                                   if option != 'iterations')


def policy_of(row: Row) -> str:
    """The policy of a row, and its guide if the row names one."""
    return row['policy'] + (f' ({row["guidance"]})' if 'guidance' in row else '')


def shown(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash for None. Whole numbers have no decimals."""
    if value is None:
        return '-'
    return f'{value:.0f}' if value == int(value) and abs(value) >= 1 else f'{value:.{digits}f}'


def one_line(text: str, most: int = SAMPLE) -> str:
    """The start of a text as a table cell, in backticks. A new line becomes a pilcrow."""
    plain = text[:most].replace('\n', '\u00b6').replace('|', '\\|').replace('`', "'")
    return f'`{plain}`'


def with_interval(row: Row, name: str) -> str:
    """'value (low - high)' of a metric."""
    interval = row.get(f'{name}_interval')
    return shown(row.get(name)) + ('' if interval is None else f' ({interval[0]:.3f} - {interval[1]:.3f})')


def setting_line(rows: Sequence[Row], command: str) -> list[str]:
    """The command that made the rows, and their common settings."""
    row = rows[0]
    head = 'through the sampler head' if row['sampler_head'] else 'without the sampler head'
    return [f'    {command}', '',
            f'{row["samples"]} texts of {row["length"]} tokens, at most {row["batch_size"]} at once, seed '
            f'{row["seed"]}, {head}, {row["dtype"]}; held-out text is {row["split"]} of {row["dataset"]}. '
            'Calls are those of a batch, seconds those of all texts.']


# Policies -----------------------------------------------------------------------------------------------------------

def policies_text(record: Row) -> str:
    """The generated part of docs/results/policies.md: one table per budget."""
    rows = record['rows']
    lines = [*setting_line([{**record['common'], **rows[0]}], record['command']), '']
    budgets = list(dict.fromkeys(row['wanted_calls'] for row in rows if 'policy' in row))
    for budget in sorted(budgets, key=lambda calls: (calls is None, calls)):
        title = 'Calls that follow from the length' if budget is None else f'{budget} trunk calls'
        lines += [f'### {title}', '', *_policies_table([row for row in rows if 'policy' in row
                                                       and row['wanted_calls'] == budget], costs=True), '']
    lines += ['### Controls', '', *_policies_table([row for row in rows if 'control' in row], costs=False)]
    return '\n'.join(lines)


def _policies_table(rows: Sequence[Row], costs: bool) -> list[str]:
    """The table of one budget. Controls have no cost to compare."""
    bits = any(row.get('reference_bits') is not None for row in rows)
    head = ['policy' if costs else 'control', *(['trunk calls', 'network calls', 'seconds'] if costs else []),
            'self-confidence', *(['reference bits'] if bits else []), 'trigram entropy', 'corpus words', 'copied',
            'repeated', 'sample']
    body = []
    for row in rows:
        figures = [f'{row["trunk_calls"]:.0f}', f'{row["network_calls"]:.0f}', f'{row["seconds"]:.1f}'] if costs else []
        body.append([name_of(row), *figures, shown(row.get('self_confidence'), 2),
                     *([shown(row.get('reference_bits'), 2)] if bits else []), shown(row['entropy_3'], 2),
                     _percent(row['known_words']), f'{row["copied_span"]:.1f}', _percent(row['repetition']),
                     one_line(row['sample']) if row.get('sample') else '-'])
    return markdown_table(head, body)


def _percent(value: float | None) -> str:
    return '-' if value is None else f'{value:.0%}'


def report_policies(evaluation: Evaluation, rows: Sequence[Result]) -> None:
    """With --report: write the tables into the page, and the record into its folder."""
    _publish(evaluation, 'policies', _record(evaluation, 'policies', rows), policies_text)


# Quality ------------------------------------------------------------------------------------------------------------

def quality_text(rows: Sequence[Row], command: str) -> str:
    """A table of the metrics with their 95 % intervals over the texts."""
    columns = [name for name in QUALITY_COLUMNS if any(row.get(name) is not None for row in rows)]
    body = [[name_of(row), shown(row.get('trunk_calls')), *(with_interval(row, name) for name in columns)]
            for row in rows]
    return '\n'.join([*setting_line(rows, command), '',
                      *markdown_table(['text', 'trunk calls', *(name.replace('_', ' ') for name in columns)], body)])


def draw_quality(evaluation: Evaluation, rows: Sequence[Result]) -> None:
    """quality.md and quality.png in the run folder."""
    folder = evaluation.out_dir
    write_whole(folder / 'quality.md',
                quality_text(rows, command_of(evaluation.config, evaluation.explicit, 'quality')) + '\n')
    evaluation.say(f'table written to {folder / "quality.md"}')
    plot_quality(rows, [f'{name_of(row)} {row["wanted_calls"] or ""}'.strip() if 'policy' in row else name_of(row)
                        for row in rows], folder / 'quality.png', evaluation.say)


# Curves -------------------------------------------------------------------------------------------------------------

class Equal(NamedTuple):
    """A policy at one budget, with every figure interpolated to the entropy of real text. name: the policy and its
    guide. lowest, highest: the range of entropy that the temperatures reach; outside it figures are None."""

    policy: str
    name: str
    wanted: int | None
    figures: dict[str, float | None]
    lowest: float
    highest: float


def at_equal_entropy(rows: Sequence[Row]) -> list[Equal]:
    """Each policy and budget, interpolated over temperature to the trigram entropy of real text of the same size."""
    target = next(row['entropy_3'] for row in rows if row.get('control') == REAL)
    groups: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in rows:
        if 'policy' in row:
            groups.setdefault((row['policy'], policy_of(row), row['wanted_calls']), []).append(row)
    found = []
    for (policy, name, wanted), group in groups.items():
        entropies = [row['entropy_3'] for row in group]
        figures = {name: at_entropy([(row['entropy_3'], row[name]) for row in group if row.get(name) is not None],
                                    target)
                   for name in (*COSTS, 'temperature', 'reference_bits', 'known_words', 'copied_span', 'repetition')}
        for end, place in (('low', 0), ('high', 1)):
            figures[end] = at_entropy([(row['entropy_3'], interval[place]) for row in group
                                       if (interval := row.get('reference_bits_interval')) is not None], target)
        found.append(Equal(policy, name, wanted, figures, min(entropies), max(entropies)))
    return found


def curves_text(rows: Sequence[Row], command: str) -> str:
    """A table of every policy and budget at equal trigram entropy."""
    real = next(row for row in rows if row.get('control') == REAL)
    body = []
    for equal in at_equal_entropy(rows):
        figures = equal.figures
        bits = '-' if figures['reference_bits'] is None else \
            f'{figures["reference_bits"]:.3f} ({figures["low"]:.3f} - {figures["high"]:.3f})'
        body.append([equal.name, shown(equal.wanted), shown(figures['trunk_calls'], 1),
                     shown(figures['network_calls'], 1), shown(figures['seconds'], 1), shown(figures['temperature'], 2),
                     bits, _percent(figures['known_words']), shown(figures['copied_span'], 1),
                     _percent(figures['repetition']), f'{equal.lowest:.2f} to {equal.highest:.2f}'])
    head = ['policy', 'asked calls', 'trunk calls', 'network calls', 'seconds', 'temperature', 'reference bits',
            'corpus words', 'copied', 'repeated', 'entropy reached']
    lines = [*setting_line(rows, command), '',
             f'Trigram entropy {real["entropy_3"]:.3f} nats, that of real text of this size, whose reference bits are '
             f'{shown(real["reference_bits"])}. Temperature is interpolated to it; a dash says that no two '
             f'temperatures have it between them.', '', *markdown_table(head, body)]
    controls = [[name_of(row), with_interval(row, 'reference_bits'), shown(row['entropy_3'])]
                for row in rows if 'control' in row]
    return '\n'.join([*lines, '', *markdown_table(['control', 'reference bits', 'trigram entropy'], controls)])


def tell_curves(evaluation: Evaluation, rows: Sequence[Result]) -> None:
    """curves.md and curves.png in the run folder."""
    folder = evaluation.out_dir
    command = command_of(evaluation.config, evaluation.explicit, 'curves')
    write_whole(folder / 'curves.md', curves_text(rows, command) + '\n')
    evaluation.say(f'table written to {folder / "curves.md"}')
    draw_curves(rows, folder / 'curves.png', evaluation.say)


def draw_curves(rows: Sequence[Row], picture: Path, say: Callable[[str], object]) -> None:
    """Reference bits at equal entropy against each cost. Each family of policies has a row of panels."""
    curves: dict[tuple[str, str], list[dict[str, float | None]]] = {}
    for equal in at_equal_entropy(rows):
        if equal.figures['reference_bits'] is not None:
            curves.setdefault((equal.policy, equal.name), []).append(equal.figures)
    controls = {row['control']: row['reference_bits'] for row in rows
                if row.get('control') in (REAL, CAUSAL) and row.get('reference_bits') is not None}
    families: dict[str, list[Curve]] = {}
    for (policy, name), points in curves.items():
        families.setdefault(POLICIES[policy].make.__module__.rsplit('.', 1)[-1], []).append(
            Curve(name, {cost: [point[cost] for point in points] for cost in COSTS},
                  [point['reference_bits'] for point in points]))
    plot_curves(families, controls, picture, say)


# Files --------------------------------------------------------------------------------------------------------------

def command_of(config: EvaluateConfig, explicit: Iterable[str], measure: str) -> str:
    """The command line that computes this measure again. explicit: the names of the options that were given."""
    given = [f'--{name}={_argument(getattr(config, name))}' for name in explicit if name != 'measure']
    return ' '.join(['python evaluate.py', f'--measure={measure}', *given])


def _argument(value: object) -> str:
    """A value in the form that a shell reads."""
    if isinstance(value, list):
        return f'"[{",".join(f"{one:g}" for one in value)}]"'
    return shlex.quote(str(value))


def _record(evaluation: Evaluation, measure: str, rows: Sequence[Row]) -> Result:
    """What the docs keep of a measure: enough to write its page again."""
    return {'measure': measure, 'command': command_of(evaluation.config, evaluation.explicit, measure),
            'checkpoint': evaluation.checkpoint_hash,
            'common': {name: rows[0][name] for name in COMMON},
            'rows': [{name: rounded(row[name]) for name in KEPT if name in row} for row in rows]}


def rounded(value: object) -> object:
    """Round floats to six decimals, since people read records too."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value


def markers(measure: str) -> tuple[str, str]:
    """The two lines of a page between which evaluate.py writes a measure."""
    return f'<!-- evaluate.py writes {measure} from here -->', f'<!-- evaluate.py writes {measure} to here -->'


def check_page(evaluation: Evaluation, measure: str) -> None:
    """Check --report before any work: UserError if its page has no place for this measure."""
    if evaluation.config.report is not None:
        split_at_markers(Path(evaluation.config.report), *markers(measure), PAGE)


def _publish(evaluation: Evaluation, measure: str, record: Result, text: Callable[[Row], str]) -> None:
    """Write the record to <measure>.json in the folder of --report's page, and its text between the page's markers."""
    if evaluation.config.report is None:
        return
    page = Path(evaluation.config.report)
    write_between(page, *markers(measure), text(record), PAGE)
    kept = page.with_name(f'{measure}.json')
    write_whole(kept, json.dumps(record, indent=1, ensure_ascii=False) + '\n')
    evaluation.say(f'{measure} written to {page} and {kept}')
