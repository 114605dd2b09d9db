"""Expressions of config files, parsed and computed here instead of executed. Standard library only.

Allowed are literals, lists, known names, arithmetic (+ - * / // % **), comparisons, and / or / not, `a if c else b`.
Numbers, texts and nesting are bounded, so no expression takes long or much memory.
"""

import ast
import difflib
import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LARGEST_TEXT = 100_000  # characters; a concatenation that doubles itself line by line stops here
LARGEST_INTEGER = 2 ** 64
DEEPEST_EXPRESSION = 100
LARGEST_EXCERPT = 300  # characters of what is quoted in a message
SHOWN_NAMES = 5  # of a long list


class Refused(Exception):
    """A value or expression that is not accepted. The message says what is accepted; it does not name the place."""


_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_, ast.IsNot: operator.is_not}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
_ALLOWED = (ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.UnaryOp, ast.USub, ast.UAdd, ast.Not, ast.BinOp,
            ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.IfExp, *_COMPARISONS, *_ARITHMETIC)
_NAMES = {ast.Call: 'a call', ast.Attribute: 'an attribute', ast.JoinedStr: 'an f-string', ast.Import: 'an import',
          ast.ImportFrom: 'an import', ast.Lambda: 'a lambda', ast.Subscript: 'an index', ast.Starred: 'a star',
          ast.ListComp: 'a comprehension', ast.SetComp: 'a comprehension', ast.DictComp: 'a comprehension',
          ast.GeneratorExp: 'a comprehension', ast.Dict: 'a dictionary', ast.Set: 'a set',
          ast.NamedExpr: 'an assignment by :=', ast.FunctionDef: 'a function', ast.ClassDef: 'a class',
          ast.For: 'a loop', ast.While: 'a loop', ast.AugAssign: 'an assignment such as +=',
          ast.AnnAssign: 'a type annotation', ast.Expr: 'an expression alone',
          ast.Tuple: 'several names', ast.List: 'several names'}


def name_of(node: ast.AST) -> str:
    """What a syntax node is, in words for a message."""
    if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        node = node.value
    return _NAMES.get(type(node), f"Python's '{type(node).__name__}'")


def parse(text: str, mode: str) -> Any:
    """Python's syntax tree of `text`; whatever the parser raises on odd input becomes `Refused`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return ast.parse(text, mode=mode)
    except SyntaxError as error:
        line = f'line {error.lineno}: ' if error.lineno else ''
        raise Refused(f'{line}this is not valid Python ({one_line(error.msg)})') from None
    except (ValueError, OverflowError):
        raise Refused('this is not valid Python text') from None
    except (RecursionError, MemoryError):
        raise Refused('expressions are nested too deeply; write them in steps') from None


def check_expression(expression: ast.expr, known: Collection[str]) -> None:
    """Refuse an expression with anything but literals, the `known` names, arithmetic, comparisons and conditions."""
    for node in ast.walk(expression):
        if not isinstance(node, _ALLOWED):
            raise Refused(f'found {name_of(node)}; values are literals, lists, arithmetic on them and names of options')
        if isinstance(node, ast.Constant) and not isinstance(node.value, (str, int, float, type(None))):
            raise Refused(f'found {shown(node.value)}; values are numbers, texts, True, False, None and lists')
        if isinstance(node, ast.Name) and node.id not in known:
            nearest = closest(node.id, known)
            hint = f"; did you mean '{nearest}'?" if nearest else ''
            raise Refused(f"the name '{shown_name(node.id)}' is not known here{hint}")


def evaluate(node: ast.expr, names: Mapping[str, object], depth: int = 0) -> Any:
    """The value of a checked expression. Raises `Refused` if it has none or is too large."""
    if depth > DEEPEST_EXPRESSION:
        raise Refused('the expression is nested too deeply; write it in steps')
    match node:
        case ast.Constant():
            return bounded(node.value)
        case ast.Name():
            return names[node.id]
        case ast.List() | ast.Tuple():
            return [evaluate(item, names, depth + 1) for item in node.elts]
        case ast.IfExp():
            return evaluate(node.body if evaluate(node.test, names, depth + 1) else node.orelse, names, depth + 1)
        case ast.BoolOp():
            value = None
            for part in node.values:
                value = evaluate(part, names, depth + 1)
                if bool(value) == isinstance(node.op, ast.Or):
                    break
            return value
        case ast.UnaryOp():
            value = evaluate(node.operand, names, depth + 1)
            if isinstance(node.op, ast.Not):
                return not value
            if type(value) not in (int, float):
                raise Refused(f'a sign needs a number, not {shown(value)}')
            return -value if isinstance(node.op, ast.USub) else value
        case ast.BinOp():
            left = evaluate(node.left, names, depth + 1)
            return _calculate(type(node.op), left, evaluate(node.right, names, depth + 1))
        case ast.Compare():
            return _compare(node, names, depth)
    raise AssertionError(f'an unchecked expression: {node}')


def _compare(node: ast.Compare, names: Mapping[str, object], depth: int) -> bool:
    left = evaluate(node.left, names, depth + 1)
    for kind, part in zip(node.ops, node.comparators):
        right = evaluate(part, names, depth + 1)
        try:
            holds = _COMPARISONS[type(kind)](left, right)
        except TypeError:
            raise Refused(f'{shown(left)} and {shown(right)} cannot be compared this way') from None
        if not holds:
            return False
        left = right
    return True


def _calculate(kind: type, left: Any, right: Any) -> Any:
    """Arithmetic on two numbers (or two texts added), within bounds."""
    texts = isinstance(left, str) and isinstance(right, str) and kind is ast.Add
    if not texts and not (type(left) in (int, float) and type(right) in (int, float)):
        raise Refused(f'arithmetic needs numbers, not {shown(left)} and {shown(right)}')
    if kind is ast.Pow and type(left) is type(right) is int and abs(left) > 1 and right > LARGEST_INTEGER.bit_length():
        raise Refused('whole numbers go up to 2**64')
    try:
        value = _ARITHMETIC[kind](left, right)
    except ZeroDivisionError:
        raise Refused(f'division by zero: {shown(left)} by {shown(right)}') from None
    except OverflowError:
        raise Refused('the result is too large') from None
    if isinstance(value, complex):
        raise Refused(f'{shown(left)} ** {shown(right)} is not a real number')
    return bounded(value)


def bounded(value: Any) -> Any:
    """`value`, unless it is an integer or a text too large to be meant."""
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise Refused('whole numbers go up to 2**64')
    if isinstance(value, str) and len(value) > LARGEST_TEXT:
        raise Refused(f'texts go up to {LARGEST_TEXT} characters')
    return value


def shown(value: Any) -> str:
    """A value for a message: on one line, printable, and short."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else f'{text[:60]}... ({len(text)} characters)'


def shown_name(name: str | Path) -> str:
    """A name or path for a message: unchanged if it is printable and short."""
    text = str(name)
    return text if text.isprintable() and 0 < len(text) <= 200 else shown(text)


def shown_names(names: Sequence[str]) -> str:
    """Several names or paths for a message: the first few, and how many more there are."""
    more = len(names) - SHOWN_NAMES
    return ', '.join(map(shown_name, names[:SHOWN_NAMES])) + (f' and {more} more' if more > 0 else '')


def closest(name: str, names: Iterable[str]) -> str | None:
    """The name that is most like `name` in spelling, or None if no name is similar."""
    by_lower_case = {candidate.lower(): candidate for candidate in names}
    found = difflib.get_close_matches(name[:100].lower(), by_lower_case, n=1, cutoff=0.5)
    return by_lower_case[found[0]] if found else None


def unknown_choice(option: str, value: str, names: Iterable[str]) -> list[str]:
    """What is wrong with the value of an option that must be one of `names`, the rows of a table: a list of one
    sentence, or an empty list."""
    names = list(names)
    if value in names:
        return []
    nearest = closest(value, names)
    return [f'{option} is {shown(value)}, but must be one of {", ".join(names)}'
            + (f"; did you mean '{nearest}'?" if nearest else '')]


def excerpt(text: str) -> str:
    """Text of a foreign file for a message: on one line, printable, and not too long."""
    text = one_line(text)
    return text if len(text) <= LARGEST_EXCERPT else f'{text[:LARGEST_EXCERPT]}...'


def one_line(text: str) -> str:
    """`text` without line breaks and unprintable characters."""
    return ' '.join(''.join(letter if letter.isprintable() else ' ' for letter in text).split())
