"""The order of the packages: an import points to the same room or to one further down, and there is no circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (  # from top to bottom
    ('train', 'sample', 'evaluate', 'bench'), ('core.study',), ('core.bench',), ('core.evaluation',), ('core',),
    ('core.sampling',), ('core.checkpoints',), ('core.pretrained',), ('core.data',), ('sample_utils', 'configurator'),
    ('core.noise',), ('model',), ('core.sampler_head',), ('core.common',))


def sources(root: Path) -> dict[str, str]:
    """The text of every module of the program by its dotted name."""
    paths = [path for path in (*root.glob('*.py'), *root.glob('core/**/*.py'))]
    return {'.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__'): path.read_text('utf-8')
            for path in paths}


def imported(module: str, text: str, known: dict[str, str]) -> Iterator[str]:
    """The modules of the program that `module` imports, inside functions too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{module} imports by relative name'
            whole = [f'{node.module}.{alias.name}' for alias in node.names]
            names = [name if name in known else node.module for name in whole]
        else:
            continue
        yield from (name for name in names if name in known)


def level(module: str) -> int:
    """The number of the room that `module` lies in, from the top."""
    rooms = {name: number for number, names in enumerate(ROOMS) for name in names}
    while module not in rooms:
        module = module.rpartition('.')[0]
        assert module, 'a module outside every room'
    return rooms[module]


def upward(known: dict[str, str]) -> list[str]:
    return [f'{module} -> {name}' for module, text in sorted(known.items())
            for name in imported(module, text, known) if level(name) < level(module)]


def test_imports_run_one_way():
    known = sources(ROOT)
    assert len(known) > 50
    assert upward(known) == []


def test_there_is_no_circle():
    known = sources(ROOT)
    TopologicalSorter({module: set(imported(module, text, known)) for module, text in known.items()}).prepare()


@pytest.mark.parametrize('module, line', [
    ('core.common.errors', 'from model import GPT'), ('core.noise', 'import sample_utils'),
    ('core.data.corpus', 'def late():\n    from core.checkpoints import run_folder'),
    ('core.pretrained.trunk', 'from core.sampling.network import Network'),
    ('core.sampling.generation', 'import core.trainer'), ('core.trainer', 'from core.evaluation.run import table'),
    ('core.study.run', 'import evaluate')])
def test_a_planted_arrow_upwards_is_found(module, line):
    known = sources(ROOT)
    assert upward({**known, module: f'{known[module]}\n{line}\n'}) != []


def test_a_planted_circle_is_found():
    known = sources(ROOT)
    known['core.common.errors'] += '\nimport core.common.files\n'
    with pytest.raises(CycleError):
        TopologicalSorter({module: set(imported(module, text, known)) for module, text in known.items()}).prepare()
