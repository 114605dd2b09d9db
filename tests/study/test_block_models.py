"""The page of block models: means over seeds, differences from controls, one loop for the commands of several seeds."""

import pytest

from core.study.block_models import SECTIONS, blocks_text

CHARACTERS = SECTIONS[0]


def row(head, values, **more):
    return {'policy': 'strided', 'trunk_calls': 1, 'head': head, 'block_length': 8, 'nats': sum(values) / len(values),
            'standard_error': 0.01, 'window_nats': values, **more}


def records():
    found = {}
    for experiment in CHARACTERS.experiments:
        seed = int(experiment.name.split()[-1])
        if experiment.measure == 'nelbo':
            rows = [{'nats': 1.375, 'standard_error': 0.01}]
        elif experiment.name.startswith('control'):
            rows = [row('none', [2.75, 2.75]), row('left_to_right', [1.5, 1.5])]
        else:
            rows = [row('none', [3.0, 3.0]), row('left_to_right', [1.25 + 0.125 * (seed % 3), 1.5 + 0.125 * (seed % 3)])]
        found[experiment.name] = {'training': experiment.training, 'rows': rows,
                                  'evaluation': f'python evaluate.py --out_dir={experiment.checkpoint.split("/")[0]}'}
    return found


def test_means_are_over_seeds_and_differences_from_controls_are_paired():
    lines = blocks_text(records()).splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')]
    assert ['causal model', '-', '1', '-', '1.375'] in cells
    means = [1.375 + 0.125 * (seed % 3) for seed in (1337, 1, 2)]
    deviation = (sum((mean - sum(means) / 3) ** 2 for mean in means) / 2) ** 0.5
    assert ['block model', '8', '3', '3.000 (0.000)', f'{sum(means) / 3:.3f} ({deviation:.3f})'] in cells
    assert ['control of the block model', '8', '3', '2.750 (0.000)', '1.500 (0.000)'] in cells
    assert ['block model', '2', '+0.125 (0.125)'] in cells and ['block model', '1', '+0.000 (0.125)'] in cells


def test_commands_of_several_seeds_are_one_loop():
    text = blocks_text(records())
    assert 'for seed in 1337 1 2; do' in text
    assert '--out_dir=out-block-$seed --seed=$seed' in text and '--out_dir=out-causal-1337 --seed=1337' in text
    assert '--max_iters=1000' in text and 'out-block-2' not in text


def test_a_model_without_a_control_has_no_table_of_differences():
    kept = {name: record for name, record in records().items() if not name.startswith('control')}
    assert 'less its control' not in blocks_text(kept)


@pytest.mark.parametrize('section', SECTIONS, ids=lambda section: section.name)
def test_each_control_belongs_to_a_model(section):
    names = {experiment.name for experiment in section.experiments}
    assert len(names) == len(section.experiments)
    assert all(name.removeprefix('control of the ') in names for name in names)
