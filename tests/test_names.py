"""docs/names.md: each name of the design documents lives where the page says."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from core.options import TrainConfig
from core.sampling.options import SampleConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / 'docs' / 'names.md').read_text(encoding='utf-8')
ROWS = [tuple(cell.strip() for cell in line.strip('|').split('|')) for line in PAGE.splitlines()
        if line.startswith('| `')]
OPTIONS = {'train.py': TrainConfig, 'sample.py': SampleConfig}
PLACES = sorted({place for row in ROWS for place in re.findall('`([^`]+)`', row[1])})


def lives(place: str) -> bool:
    """Whether there is such an option, file or Python name."""
    script, _, option = place.partition(' --')
    if option:
        fields = dataclasses.fields(OPTIONS[script])
        return option in {one.name for one in fields} | {one.metadata.get('alias') for one in fields}
    if place.endswith(('.py', '.md')):
        return (ROOT / place).is_file()
    parts = place.split('.')
    length = next(length for length in range(len(parts), 0, -1)
                  if (ROOT / '/'.join(parts[:length])).with_suffix('.py').is_file())
    found = importlib.import_module('.'.join(parts[:length]))
    for name in parts[length:]:
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return len(parts) > length


@pytest.mark.parametrize('place', PLACES)
def test_a_name_lives_where_the_page_says(place):
    assert lives(place), f'docs/names.md names {place}'


def test_what_does_not_live_is_seen():
    for gone in ('sample.py --no_such', 'sample_utils.gone', 'core/gone.py', 'model.GPT.gone', 'model'):
        assert not lives(gone)


def test_no_name_is_listed_twice():
    names = [name for row in ROWS for name in re.findall('`([^`]+)`', row[0])]
    assert len(names) > 90 and len(set(names)) == len(names)
    assert all(len(row) in (2, 3) for row in ROWS)


def test_names_that_were_kept_are_the_same_name():
    """A name of the documents that exists under this very name is not sent elsewhere."""
    options = {one.name for config in OPTIONS.values() for one in dataclasses.fields(config)}
    for named, place, *_ in ROWS:
        olds, news = re.findall('`([^`]+)`', named), re.findall('`([^`]+)`', place)
        for old in olds:
            if old in options and old != 'sampler_head':  # the option of that name takes a file
                assert any(new.endswith(f'--{old}') for new in news), old


def test_the_default_of_the_remasking_loss_is_that_of_the_documents():
    assert TrainConfig().remasking_loss_type == 'corrupted_only'
    config = (ROOT / 'config' / 'train_char_remasking.py').read_text()
    assert re.search(r"\n# The default, corrupted_only, [^\n]*\nremasking_loss_type = 'balanced'\n", config)
