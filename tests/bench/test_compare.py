"""Two records side by side: what became faster, what makes them hard to compare, what cannot be compared."""

import dataclasses
import json

import pytest

from bench import main
from core.bench.records import COPY
from core.common.errors import UserError
from helpers.benchmark import TINY, group

MACHINE = {'versions': {'python': '3', 'torch': '2', 'numpy': '1'}, 'processor': 'P', 'processors': 2, 'threads': 2,
           'devices': [], 'fast_bfloat16': False, 'load_average': 0.5, 'platform': 'X', 'git_revision': 'abc'}


def a_record(machine=MACHINE, name='tiny', shape=TINY, **groups):
    settings = {'shape': vars(shape), 'device': 'cpu', 'dtype': 'float32', 'sampling_dtype': 'float32',
                'compile': True, 'critic_row_stride': 4, 'parameters': 5}
    return {'format': 'masked-diffusion-benchmark', 'version': 2, 'machine': machine,
            'shapes': {name: {**settings, **groups}}}


def compared(tmp_path, capsys, before, after):
    """(warnings, cells of each row by its first cell) of `bench.py --compare`."""
    paths = [tmp_path / 'before.json', tmp_path / 'after.json']
    for path, one in zip(paths, (before, after)):
        path.write_text(json.dumps(one))
    main(['--compare', *map(str, paths)])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')]
    return [line for line in lines if line.startswith('warning')], {row[0]: row[1:] for row in rows}, lines


def test_common_rows_of_two_records_are_compared(tmp_path, capsys):
    run = {'tokens': 8, 'seconds': [1.0, 2.0, 3.0], 'trunk_calls': 3, 'trunk_seconds': [0.75, 1.5, 2.25],
           'network_calls': 3, 'network_seconds': [0.75, 1.5, 2.25]}
    before = a_record(fill=group(**{'trunk call': [2.0, 4.0, 6.0], 'wavefront fill': [1.0, 1.0, 3.0]}),
                      sampling=group(**{'standard, batch 1': [1.0] * 3}),
                      policies={'bare_seconds': [0.25, 0.5, 0.75], 'runs': {'remask': run, 'gone': run}})
    after = a_record({**MACHINE, 'git_revision': 'def', 'load_average': 0.0},
                     fill=group(**{'trunk call': [1.0, 2.0, 8.0], 'wavefront fill': [2.0, 2.0, 2.0]}),
                     policies={'bare_seconds': [0.25] * 3,
                               'runs': {'remask': {**run, 'seconds': [0.5, 0.5, 0.5]}, 'new': run}})
    warnings, rows, lines = compared(tmp_path, capsys, before, after)
    assert warnings == [] and 'revision abc.' in '\n'.join(lines) and 'revision def.' in '\n'.join(lines)
    assert rows['trunk call'] == ['4000.0 (2000.0 - 6000.0)', '2000.0 (1000.0 - 8000.0)', '2.000', '0.250', '6.000']
    assert rows['wavefront fill'][2:] == ['0.500', '0.500', '1.500']
    assert rows['policy remask'][2:] == ['4.000', '2.000', '6.000']
    assert rows['wavefront fill / trunk call'] == ['0.500 (0.250 - 0.500)', '1.000 (0.250 - 2.000)']
    assert not {'policy gone', 'policy new', 'standard, batch 1'} & set(rows)


@pytest.mark.parametrize('machine, entry, words', [
    ({'processor': 'Q'}, {}, ['the processor differs: P before, Q after']),
    ({'threads': 4, 'processors': 4}, {}, ['processors differs: 2', 'threads differs: 2 before, 4 after']),
    ({'versions': {'python': '3', 'torch': '3', 'numpy': '1'}}, {}, ['version of torch differs: 2 before, 3 after']),
    ({}, {'compile': False, 'critic_row_stride': 1}, ['compiled differs: True', 'critic is trained on differs: 4']),
    ({}, {'fill': {'float32': 1.12e9}}, ['tiny: the float32 matrix rate of fill differs: 1 GFLOP/s before, 1 after']),
    ({}, {'fill': {'float32': 0.89e9}}, ['the float32 matrix rate of fill']),
    ({}, {'fill': {COPY: 5e9}}, ['the copy rate of fill differs: 4 GB/s before, 5 after']),
    ({}, {'fill': {'float32': 1.09e9}}, []), ({}, {'fill': {'float32': 0.92e9, COPY: 4.3e9}}, []),
])
def test_what_makes_two_records_hard_to_compare_is_warned_of(machine, entry, words, tmp_path, capsys):
    def filled(rates):
        fill = group(**{'trunk call': [1.0] * 3, 'wavefront fill': [1.0] * 3})
        fill['rates'] = {name: [1e3, rate, 1e15] for name, rate in {'float32': 1e9, COPY: 4e9, **rates}.items()}
        return fill

    after = {**entry, 'fill': filled(entry.get('fill', {}))}
    warnings, _, _ = compared(tmp_path, capsys, a_record(fill=filled({})), a_record({**MACHINE, **machine}, **after))
    assert len(warnings) == len(words) and all(word in line for word, line in zip(words, warnings)), warnings


def test_another_shape_of_the_same_name_is_left_out(tmp_path, capsys):
    fill = group(**{'trunk call': [1.0] * 3, 'wavefront fill': [1.0] * 3})
    before, after = a_record(fill=fill), a_record(fill=fill)
    wider = a_record(name='other', fill=fill, shape=dataclasses.replace(TINY, n_embd=32))
    before['shapes'] |= wider['shapes']
    after['shapes'] |= a_record(name='other', fill=fill)['shapes']
    warnings, _, lines = compared(tmp_path, capsys, before, after)
    assert len(warnings) == 1 and 'other' in warnings[0] and '### tiny' in lines and '### other' not in lines


def test_a_record_older_than_a_part_of_the_shape_is_read(tmp_path, capsys):
    """A shape is told apart by what a record says of it; what it does not say was as it is by default."""
    fill = group(**{'trunk call': [1.0] * 3, 'wavefront fill': [1.0] * 3})
    before = a_record(fill=fill)
    shape = before['shapes']['tiny']['shape']
    before['shapes']['tiny']['shape'] = {key: shape[key] for key in shape if key not in ('base_size', 'sampler_output')}
    warnings, rows, _ = compared(tmp_path, capsys, before, a_record(fill=fill))
    assert warnings == [] and rows['trunk call'][2] == '1.000'
    with pytest.raises(UserError, match='no row in common'):
        compared(tmp_path, capsys, before, a_record(fill=fill, shape=dataclasses.replace(TINY, base_size=30)))


def test_records_without_a_common_row_are_refused_with_what_they_hold(tmp_path, capsys):
    fill = group(**{'trunk call': [1.0] * 3, 'wavefront fill': [1.0] * 3})
    for other in (a_record(name='small', fill=fill), a_record(policies={'bare_seconds': [1.0], 'runs': {}}),
                  a_record(fill=fill, shape=dataclasses.replace(TINY, n_embd=32))):
        with pytest.raises(UserError) as raised:
            compared(tmp_path, capsys, a_record(fill=fill), other)
        held, = other['shapes']
        assert 'no row in common' in str(raised.value) and f'{held}: ' in str(raised.value)
        assert 'tiny: fill' in str(raised.value) and '--shapes and --groups' in str(raised.value)


@pytest.mark.parametrize('damage, words', [
    (lambda entry: entry['fill']['cases']['trunk call'].update(seconds=[1.0]), 'the rounds of tiny.fill differ'),
    (lambda entry: entry['fill']['cases']['trunk call'].update(seconds=[]), 'has 0 items'),
    (lambda entry: entry['fill']['cases']['trunk call'].update(dtype='float8'), 'tiny.fill lacks the rate of a case'),
    (lambda entry: entry['fill']['cases']['trunk call'].update(operations='many'), "operations is 'many'"),
    (lambda entry: entry['fill']['cases'].pop('wavefront fill'), "lacks 'wavefront fill'"),
    (lambda entry: entry['sampling']['cases'].pop('standard, batch 1'), 'without standard, batch 1 to compare it with'),
    (lambda entry: entry['decode']['cases'].pop('causal_decode, batch 1, float32'), 'without causal_decode, batch 1'),
    (lambda entry: entry['policies']['bare_seconds'].append(1.0), 'the rounds of tiny.policies differ'),
    (lambda entry: entry['shape'].update(n_layer=0), 'n_layer is 0'), (lambda entry: entry.update(fill=3), 'fill is 3'),
    (lambda entry: entry['shape'].update(depth=2), "holds 'depth'")])
def test_absurd_records_are_one_sentence(damage, words, tmp_path):
    run = {'tokens': 8, 'seconds': [1.0], 'trunk_calls': 3, 'trunk_seconds': [0.75], 'network_calls': 3,
           'network_seconds': [0.75]}
    record = json.loads(json.dumps(a_record(
        fill=group(**{'trunk call': [1.0] * 3, 'wavefront fill': [1.0] * 3}),
        sampling=group(**{'diffusion, batch 1': [1.0] * 3, 'standard, batch 1': [1.0] * 3}),
        decode=group(**{'diffusion K=4, batch 1, float32': [1.0] * 3, 'causal_decode, batch 1, float32': [1.0] * 3}),
        policies={'bare_seconds': [0.25], 'runs': {'remask': run}})))
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(record))
    main([f'--from_json={path}'])
    damage(record['shapes']['tiny'])
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match='cannot read .*a.json.*make it with bench.py') as refused:
        main([f'--from_json={path}'])
    assert words in str(refused.value) and '\n' not in str(refused.value)
