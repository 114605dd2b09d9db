"""docs/tour.ipynb, read as JSON."""

import ast
import json
from pathlib import Path
from typing import Any

TOUR = Path(__file__).parent.parent.parent / 'docs' / 'tour.ipynb'


def tour() -> dict[str, Any]:
    """The notebook."""
    return json.loads(TOUR.read_text(encoding='utf-8'))


def sources(kind: str) -> list[str]:
    """The sources of its cells of that kind, 'code' or 'markdown'."""
    return [''.join(cell['source']) for cell in tour()['cells'] if cell['cell_type'] == kind]


def commands_of_tour() -> list[str]:
    """The commands that its cells `run`, such as 'train.py --device=cpu'."""
    constants: dict[str, Any] = {}  # such as ITERATIONS, which a command may hold
    found = []
    for source in sources('code'):
        tree = ast.parse(source)
        for line in tree.body:
            if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]).strip('()').isupper():
                exec(compile(ast.Module([line], []), 'tour', 'exec'), constants)
            elif isinstance(line, ast.Expr) and isinstance(line.value, ast.Call) \
                    and getattr(line.value.func, 'id', None) == 'run':
                found.append(eval(compile(ast.Expression(line.value.args[0]), 'tour', 'eval'), constants))
    return found
