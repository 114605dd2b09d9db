"""The study: which checkpoints are measured, what is kept of them, and what the page says of the records."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from core.common.errors import UserError
from core.common.tables import split_at_markers
from core.evaluation.options import EvaluateConfig
from core.evaluation.quality_tables import markers
from core.study.pages import Experiment, Section, kept_records, total_text, training_facts, write_report
from core.study.records import read_records
from core.study.remasking import SECTIONS as REMASKING_SECTIONS
from core.study.results import SECTIONS as RESULT_SECTIONS, calls_without, windows_text
from core.study.words import commands, difference

ROOT = Path(__file__).resolve().parents[2]


ROW = {'dataset': 'd', 'split': 'val', 'kind': 'unmasking', 'standard_error': 0.1, 'bits': 2.0, 'unit': 'character',
       'seconds': 3.0}


def make_page(folder, names):
    page = folder / 'study.md'
    page.write_text('before\n\n' + '\n\n'.join(
        '\n\n'.join(markers(name)) for name in (*names, 'total')) + '\n\nafter\n')
    return page


def text_of(records):
    return '\n'.join(f'{name}: {record["rows"][0]["nats"]}, {record["evaluation"]}' for name, record in records.items())


def run(page, sections, nats=1.5):
    said, asked = [], []

    def evaluate(config, explicit):
        asked.append((config.measure, config.out_dir, config.checkpoint_name, config.report, set(explicit)))
        return [{**ROW, 'nats': nats, 'data_hash': 'x', 'windows': config.windows, 'elapsed': 0.7}]

    write_report(dataclasses.replace(EvaluateConfig(), report=str(page)), sections, evaluate, said.append)
    return said, asked


def test_a_record_holds_only_the_rows_that_its_experiment_keeps(tmp_path):
    there = tmp_path / 'out-a' / 'ckpt_best.pt'
    there.parent.mkdir()
    there.write_bytes(b'')
    rows = [{**ROW, 'nats': nats, 'windows': 3, 'elapsed': 0.7} for nats in (1.0, 2.0, 3.0)]
    page = make_page(tmp_path, ['study'])
    sections = [Section('study', (Experiment('a', 'train a', str(there), 'nelbo', keeps=lambda row: row['nats'] > 1.5),),
                        text_of)]
    write_report(dataclasses.replace(EvaluateConfig(), report=str(page)), sections, lambda config, explicit: rows, print)
    kept = json.loads((tmp_path / 'study.json').read_text())['a']
    assert [row['nats'] for row in kept['rows']] == [2.0, 3.0]
    assert kept['evaluation_seconds'] == 2.1  # what was left out was measured too


def test_what_is_there_is_measured_and_what_is_not_is_read_or_named(tmp_path):
    there, gone = tmp_path / 'out-a' / 'ckpt_best.pt', tmp_path / 'out-b' / 'ckpt_best.pt'
    there.parent.mkdir()
    there.write_bytes(b'')
    sections = [Section('study', (Experiment('a', 'train a', str(there), 'nelbo', {'windows': 7}),
                                  Experiment('b', 'train b', str(gone), 'nelbo')), text_of)]
    page = make_page(tmp_path, ['study'])
    said, asked = run(page, sections)
    assert asked == [('nelbo', str(there.parent), 'ckpt_best.pt', None, {'out_dir', 'checkpoint_name', 'windows'})]
    assert f'{gone} does not exist; make it with: train b' in '\n'.join(said)
    text = page.read_text()
    assert f'a: 1.5, python evaluate.py --measure=nelbo --out_dir={there.parent} --windows=7' in text
    assert text.startswith('before') and text.endswith('after\n')
    kept = json.loads((tmp_path / 'study.json').read_text())
    assert kept['a']['rows'] == [{**ROW, 'nats': 1.5, 'windows': 7}] and 'b' not in kept
    assert kept['a']['evaluation_seconds'] == 0.7 and '| together |         0 |' in text
    there.unlink()
    said, asked = run(page, sections, nats=9.0)  # from the record
    assert asked == [] and page.read_text() == text and len(said) == 3
    there.write_bytes(b'')
    run(page, sections, nats=2.5)
    assert 'a: 2.5' in page.read_text() and json.loads((tmp_path / 'study.json').read_text())['a'] != kept


def test_a_section_without_any_result_leaves_the_page_alone(tmp_path):
    page = make_page(tmp_path, ['study'])
    before = page.read_text()
    said, _ = run(page, [Section('study', (Experiment('b', 'train b', 'nowhere/b.pt', 'nelbo'),), text_of)])
    assert page.read_text() == before and 'train b' in said[0]


def test_a_page_without_a_place_is_refused_before_any_work(tmp_path):
    page = make_page(tmp_path, ['other'])
    with pytest.raises(UserError, match='evaluate.py writes study from here'):
        run(page, [Section('study', (), text_of)])


@pytest.mark.parametrize('content', ['{"mine": 1}', 'words'])
def test_records_of_someone_else_are_refused_before_any_work(tmp_path, content):
    page = make_page(tmp_path, ['a', 'b'])
    (tmp_path / 'b.json').write_text(content)
    before = page.read_text()
    there = tmp_path / 'ckpt.pt'
    there.write_bytes(b'')
    with pytest.raises(UserError, match='b.json'):
        run(page, [Section(name, (Experiment('a', 'train a', str(there), 'nelbo'),), text_of) for name in 'ab'])
    assert page.read_text() == before and [one.name for one in tmp_path.glob('*.json')] == ['b.json']


def test_another_page_is_refused_with_the_names_of_those_there_are(tmp_path):
    with pytest.raises(UserError, match='other.md is no page of the study; give --report=docs/results/study.md or docs/b.md'):
        run(tmp_path / 'other.md', [Section('a', (), text_of), Section('b', (), text_of, page='docs/b.md')])


def test_a_damaged_record_is_refused(tmp_path):
    path, good = tmp_path / 'study.json', {**ROW, 'nats': 1.5, 'windows': 7}
    assert read_records(path, {'a': 'nelbo'}) == {}
    path.write_text(json.dumps({'a': {'training': 'x', 'rows': [good]}}))
    assert read_records(path, {'a': 'nelbo'})['a']['rows'] == [good]
    for content in ('{', '[]', '{"a": 1}', '{"a": {}}', '{"a": {"training": 3}}', '{"a": {"training": "x"}}',
                    *(json.dumps({'a': {'training': 'x', 'rows': rows}}) for rows in (
                        [], [{}], 3, [{**good, 'nats': 'x'}], [{**good, 'nats': None}], [{**good, 'more': 1}],
                        [{**good, 'windows': -1}])), '{"a": {"training": "x", "seconds": 1e999, "rows": []}}'):
        path.write_text(content)
        with pytest.raises(UserError, match='damaged.*take it from the repository again') as refused:
            read_records(path, {'a': 'nelbo'})
        assert '\n' not in str(refused.value)
    path.write_text(json.dumps({'a': {'training': 'x', 'rows': [good]}}))
    with pytest.raises(UserError, match='a holds rows'):
        read_records(path, {'a': None})


def test_what_metrics_say_of_a_training(tmp_path):
    assert training_facts(tmp_path) == {}
    lines = [{'kind': 'evaluation', 'iteration': 0, 'val/nelbo': 4.0, 'train_seconds': 0.0},
             {'kind': 'iteration', 'iteration': 0, 'train/loss': 4.0, 'seconds': 30.0},
             {'kind': 'iteration', 'iteration': 1, 'train/loss': 3.0, 'seconds': 0.2},
             {'kind': 'iteration', 'iteration': 2, 'train/loss': 2.0, 'seconds': 0.4},
             {'kind': 'iteration', 'iteration': 3, 'train/loss': 1.0, 'seconds': 0.3},
             {'kind': 'evaluation', 'iteration': 4, 'val/nelbo': 2.0, 'train_seconds': 31.0}]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    facts = training_facts(tmp_path)
    assert facts['iterations'] == 4 and facts['seconds'] == 31.0 and facts['step_ms'] == 300.0
    assert facts['validations'] == [{'iteration': 0, 'nelbo': 4.0}, {'iteration': 4, 'nelbo': 2.0}]
    assert facts['losses'] == {'train/loss': 1.0}
    (tmp_path / 'metrics.jsonl').write_text(json.dumps(lines[0]))
    with pytest.raises(UserError, match='no iteration'):
        training_facts(tmp_path)
    for damaged in ('{', '[]', '3', '\0', '{"kind": "iteration"}\n{"kind": "evaluation"}', '\u00ff{'):
        (tmp_path / 'metrics.jsonl').write_text(damaged, encoding='latin-1')
        with pytest.raises(UserError, match='metrics.jsonl is damaged or of another program'):
            training_facts(tmp_path)


def row(policy, calls, head, nats):
    return {'policy': policy, 'trunk_calls': calls, 'head': head, 'nats': nats, 'standard_error': 0.1,
            'window_nats': [nats - 1, nats + 1], 'head_share': 0.2, 'windows': 2, 'seed': 1}


def test_commands_that_differ_in_a_seed_alone_are_a_loop():
    records = {f'{name} {seed}': {'training': f'train {name} --seed={seed} --out=out-{name}-{seed}',
                                  'evaluation': f'evaluate --out=out-{name}-{seed}'}
               for name in ('a', 'b') for seed in (1337, 1338)}
    records |= {'c': {'training': 'train c'}, 'd': {'training': 'train d --seed=1339'}}
    assert commands(records) == [
        '    for seed in 1337 1338; do', '        train a --seed=$seed --out=out-a-$seed',
        '        train b --seed=$seed --out=out-b-$seed', '    done', '    train c', '    train d --seed=1339',
        '    for seed in 1337 1338; do', '        evaluate --out=out-a-$seed', '        evaluate --out=out-b-$seed',
        '    done']


def test_differences_are_paired():
    one, other = row('random', 1, 'none', 2.0), row('random', 1, 'wave', 1.5)
    assert difference(one, other) == (0.5, 0.0)  # each window differs by the same, whatever their spread
    value, error = difference({'window_nats': [1.0, 2.0, 3.0]}, {'window_nats': [1.0, 1.0, 1.0]})
    assert value == 1.0 and error == pytest.approx(1 / math.sqrt(3))


def test_the_trunk_calls_that_equal_a_figure_are_interpolated_in_their_logarithm():
    rows = {('random', calls, 'none'): row('random', calls, 'none', nats)
            for calls, nats in ((1, 4.0), (2, 3.0), (4, 2.0))}
    assert calls_without(rows, 'random', 3.0) == '2.0' and calls_without(rows, 'random', 2.5) == '2.8'
    assert calls_without(rows, 'random', 1.9) == '> 4' and calls_without(rows, 'random', 4.5) == '< 1'


def test_a_window_stands_beside_its_control():
    records = {'trunk alone': {'training': 't', 'rows': [row('random', calls, 'none', 3.0) for calls in (1, 4, 8)]},
               'C = 2, head': {'training': 'h',
                               'rows': [row('random', calls, 'left_to_right', 2.0) for calls in (1, 4)]},
               'C = 2, blind': {'training': 'b', 'rows': [row('random', calls, 'left_to_right', 2.25)
                                                          for calls in (1, 4)]}}
    lines = windows_text(records).splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')]
    assert ['C = 2, head - blind', '-0.250 (0.000)', '-0.250 (0.000)', '-'] in cells
    assert cells[0] == ['', 'K = 1', 'K = 4', 'K = 8'] and lines[-1].endswith('C = 2: 20.0%.')


def test_a_training_that_serves_two_sections_costs_once():
    records = {'training': 't', 'seconds': 100.4, 'evaluation_seconds': 2.0}
    other = {'training': 'u', 'seconds': 7.0}
    lines = total_text({'one': {'a': records}, 'none': {}, 'two': {'b': {**records, 'evaluation_seconds': 3.0},
                                                                   'c': other}}).splitlines()
    assert [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]] == [
        ['one', '1', '100', '2'], ['two', '1', '7', '3'], ['together', '2', '107', '5']]


def shown_on(page, name):
    """The text between the markers of a page."""
    begin, end = markers(name)
    before, after = split_at_markers(ROOT / page, begin, end, page)
    text = (ROOT / page).read_text()
    return text[len(before) + len(begin):len(text) - len(after) - len(end)].strip('\n')


@pytest.mark.parametrize('sections', (RESULT_SECTIONS, REMASKING_SECTIONS), ids=('results', 'remasking'))
def test_the_totals_are_those_of_the_records(sections):
    records = {section.name: kept_records(ROOT / 'docs' / 'results', section) for section in sections}
    assert shown_on(sections[0].page, 'total') == (total_text(records) if any(records.values()) else '')


@pytest.mark.parametrize('section', (*RESULT_SECTIONS, *REMASKING_SECTIONS), ids=lambda section: section.name)
def test_the_page_says_what_its_records_say(section):
    """No figure typed by hand: the text between the markers is made of the kept records, byte for byte, and
    empty without them."""
    records = kept_records(ROOT / 'docs' / 'results', section)
    assert shown_on(section.page, section.name) == (section.text(records).strip('\n') if records else '')
    names = [experiment.name for experiment in section.experiments]
    assert len(set(names)) == len(names) and set(records) <= set(names)
