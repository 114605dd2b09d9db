"""Options of a script from config files (`key = value`, nanoGPT's form) and `--key=value`; nothing is executed.

    python train.py config/train_char_diffusion_sampler.py --batch_size=32 --dataset=custom

A script describes its options once, as a flat dataclass:

    @dataclass(frozen=True)
    class TrainConfig:
        batch_size: int = option(64, 'rows per micro-step; lower it when memory runs out')

    configuration = configure(TrainConfig, sys.argv[1:])

Every `--key=value` beats every config file, and among each kind the later one wins. A config file is parsed, never
executed: it may hold assignments of literals, lists and arithmetic to known keys, and conditions on known names
(`device` among them). Its first statement may be `base_config = 'config/other.py'`: that file is read before the rest.
A name that the command line sets has that value everywhere, so `lr_decay_iters = max_iters` follows `--max_iters=100`.
Every problem of all files and arguments is listed in one `UserError`.
"""

import ast
import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from core.common.errors import UserError, raise_problems
from core.common.expressions import (Refused, bounded, check_expression, closest, evaluate, name_of, one_line, parse,
                                     shown, shown_name)
from core.common.printing import say

Options = TypeVar('Options')

LARGEST_FILE = 100_000  # bytes; config files hold differences only
MOST_PROBLEMS_SHOWN = 30
COMMAND_LINE = 'command line'
BASE = 'base_config'  # in a config file's first line: another that is read before it
LONGEST_NAME = 255  # bytes of one part of a path
CONFIGS = Path(__file__).parent / 'config'  # config files may be named without it


@dataclass(frozen=True)
class Configuration(Generic[Options]):
    """The options, where each explicit one was set, and what conditions in config files changed."""

    config: Options
    explicit: dict[str, str]  # key -> 'command line' or 'config/x.py:12'; defaults are absent
    notes: list[str]  # "config/x.py: device is 'cpu', so n_layer 6 -> 4"


def option(default: Any, help: str, *, alias: str | None = None, bare: str | None = None, path: bool = False,
           minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field of an options class.

    help: one line with its unit, or when to change it. alias: a second name. bare: the value of `--key` without `=`;
    None: that is an error. path: it names a file or folder, so that `~` is the home folder. minimum, maximum: the
    bounds of a number, inclusive.
    """
    given = {'help': help, 'alias': alias, 'bare': bare, 'path': path, 'minimum': minimum, 'maximum': maximum}
    metadata = {key: value for key, value in given.items() if value is not None and value is not False}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def configure(options: type[Options], arguments: Sequence[str],
              offered: Mapping[str, object] = types.MappingProxyType({}), *,
              resolve_device: Callable[[str], str] | None = None, usage: str | Callable[[], str] = '',
              defaults: Mapping[str, object] = types.MappingProxyType({}), source: str = '') -> Configuration[Options]:
    """Read config files and `--key=value` arguments into one `options` object.

    `offered` are further names that config files may read. If there is an option `device`, config files read
    `resolve_device(device)` instead, so that they see 'cpu' or 'cuda' for 'auto'; `config.device` keeps the value that
    was given. `--help` prints `usage` and every option, and exits with code 0. `defaults`, read from the file `source`,
    replace the options' own defaults. Raises `UserError` that lists all problems.
    """
    if any(argument in ('--help', '-h') for argument in arguments):
        say(help_text(options, usage if isinstance(usage, str) else usage()))
        raise SystemExit(0)
    keys = _Keys.of(options)
    problems: list[str] = []
    paths, texts = _split_arguments(arguments, keys, problems)
    values = {key: _default_of(entry) for key, entry in keys.fields.items()}
    for key in keys.fields.keys() & defaults.keys():
        try:
            values[key] = _from_value(defaults[key], keys.types[key])
        except Refused as refused:
            problems.append(f'{key}={shown(defaults[key])} in {source}: {refused}')
    explicit: dict[str, str] = {}
    for written, text in texts:
        key = keys.find(written)
        if key is None:
            problems.append(f'--{shown_name(written)} on the {COMMAND_LINE}: no such option{keys.nearest(written)}')
            continue
        try:
            values[key] = _from_text(text, keys.types[key])
            if keys.fields[key].metadata.get('path') and values[key] is not None:
                values[key] = os.path.expanduser(values[key])
            explicit[key] = COMMAND_LINE
        except Refused as refused:
            problems.append(f'--{written}={shown(text)} on the {COMMAND_LINE}: {refused}')
    readable = dict(values) | dict(offered)
    reader = _FileReader(keys, values, readable, explicit, problems, resolve_device)
    if paths or not problems or 'device' in explicit:
        reader.see_device(explicit.get('device', 'default'))
    for path in paths:
        reader.read(path)
    if len(problems) > MOST_PROBLEMS_SHOWN:
        problems[MOST_PROBLEMS_SHOWN:] = [f'and {len(problems) - MOST_PROBLEMS_SHOWN} more problems']
    raise_problems(problems)
    return Configuration(options(**values), explicit, reader.notes)


def bound_problems(config: object) -> list[str]:
    """A sentence for each option of `config` that lies outside its own bounds."""
    return [problem for entry in dataclasses.fields(config)
            for problem in _bound_problems(entry.name, entry, getattr(config, entry.name))]


def _bound_problems(key: str, entry: dataclasses.Field, value: Any) -> list[str]:
    """A sentence if a value of the right type lies outside the bounds of its option."""
    if entry.metadata.get('path') and value is not None:
        return path_problems(key, value)
    low, high = entry.metadata.get('minimum'), entry.metadata.get('maximum')
    if value is None or low is None and high is None:
        return []
    if low is not None and value < low:
        return [f'{key} is {value}, but must ' + ('not be negative' if low == 0 else f'be at least {low:,}')]
    return [f'{key} is {value}, but must be at most {high:,}'] if high is not None and value > high else []


def path_argument(key: str, text: str) -> Path:
    """`text`, the argument `key` of a command without an options class, as a path; UserError if it cannot be one."""
    raise_problems(path_problems(key, text) if text.strip() else
                   [f'{key} is empty; is a variable of the shell unset? Name one'])
    return Path(os.path.expanduser(text))


def path_problems(key: str, path: str) -> list[str]:
    """What is wrong with the name of a file or folder, without a look at the disk."""
    parts = re.split(r'[/\\]' if os.name == 'nt' else '/', path)
    longest = max(len(os.fsencode(part)) for part in parts)
    if longest > LONGEST_NAME:
        return [f'{key} has a name of {longest} bytes ({shown(path)}), but file systems take at most {LONGEST_NAME}; '
                f'shorten it']
    if os.name != 'nt' and '\\' in path and not os.path.exists(path):
        return [f'{key} is {shown(path)}, but folders are parted by / on this system: {path.replace(chr(92), "/")}']
    return []


def help_text(options: type, usage: str = '') -> str:
    """One line per option: name, default, type and help."""
    keys = _Keys.of(options)
    names = [f'--{key}={_default_of(entry)}' for key, entry in keys.fields.items()]
    kinds = [keys.types[key].short for key in keys.fields]
    name_width = min(36, max(map(len, names), default=0))
    kind_width = min(14, max(map(len, kinds), default=0))
    lines = []
    for name, kind, entry in zip(names, kinds, keys.fields.values()):
        alias = f' (also --{entry.metadata["alias"]})' if 'alias' in entry.metadata else ''
        bare = f' (--{entry.name} alone: {keys.bare[entry.name]})' if entry.name in keys.bare else ''
        lines.append(f'  {name:<{name_width}}  {kind:<{kind_width}}  {entry.metadata.get("help", "")}{alias}{bare}')
    head = [usage.strip(), ''] if usage.strip() else []
    return '\n'.join([*head, 'config files (*.py) and options, in any order; --key=value beats a config file:', *lines])


# ---- the keys of an options class and their types


@dataclass(frozen=True)
class _Type:
    """One option's type: a kind, whether None is allowed, the choices of a Literal, and the enum that these are of."""

    kind: Any  # int, float, bool, str, list or Literal
    optional: bool
    choices: tuple = ()
    item: type = float  # of a list
    enum: type[StrEnum] | None = None

    @classmethod
    def of(cls, annotation: Any) -> '_Type':
        members = typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            rest = [member for member in members if member is not type(None)]
            assert len(rest) == 1 and len(members) == 2, f'an option is one type or None, not {annotation}'
            return dataclasses.replace(cls.of(rest[0]), optional=True)
        if typing.get_origin(annotation) is Literal:
            plain = tuple(choice for choice in members if choice is not None)
            return cls(Literal, len(plain) < len(members), plain)
        if isinstance(annotation, type) and issubclass(annotation, StrEnum):
            return cls(Literal, False, tuple(one.value for one in annotation), enum=annotation)
        if annotation in (list[float], list[int]):
            return cls(list, False, item=typing.get_args(annotation)[0])
        assert annotation in (int, float, bool, str), f'an option cannot have the type {annotation}'
        return cls(annotation, False)

    @property
    def short(self) -> str:
        """For the help text: 'int', 'floats', 'linear|cosine', 'int|None'."""
        name = '|'.join(map(str, self.choices)) or {list: f'{self.item.__name__}s'}.get(self.kind) or self.kind.__name__
        return f'{name}|None' if self.optional else name

    @property
    def words(self) -> str:
        """For messages."""
        words = {int: 'a whole number such as 64', float: 'a finite number such as 0.5 or 3e-4', bool: 'True or False',
                 str: 'text', list: 'a list of finite numbers such as [0.9, 0.5, 0.1]' if self.item is float else
                 'a whole number such as 8, or a list such as [1, 8]'}.get(self.kind) or (
                     'one of ' + ', '.join(map(repr, self.choices)))
        return f'{words}, or None' if self.optional else words


@dataclass(frozen=True)
class _Keys:
    """The options by name, with their aliases and types."""

    fields: dict[str, dataclasses.Field]
    types: dict[str, _Type]
    aliases: dict[str, str]  # alias -> key
    bare: dict[str, str]  # key -> its value where `--key` has none

    @classmethod
    def of(cls, options: type) -> '_Keys':
        fields = {entry.name: entry for entry in dataclasses.fields(options)}
        hints = typing.get_type_hints(options)
        aliases = {entry.metadata['alias']: key for key, entry in fields.items() if 'alias' in entry.metadata}
        assert not set(aliases) & set(fields), 'an alias is the name of another option'
        bare = {key: entry.metadata['bare'] for key, entry in fields.items() if 'bare' in entry.metadata}
        return cls(fields, {key: _Type.of(hints[key]) for key in fields}, aliases, bare)

    def find(self, name: str) -> str | None:
        return name if name in self.fields else self.aliases.get(name)

    def is_text(self, name: str) -> bool:
        """Whether the option takes any text that is no path."""
        key = self.find(name)
        return key is not None and self.types[key].kind is str and 'path' not in self.fields[key].metadata

    def nearest(self, name: str) -> str:
        """' (did you mean ...?)' for the option closest in spelling; otherwise where the names are listed."""
        nearest = closest(name.replace('-', '_'), [*self.fields, *self.aliases])
        return f"; did you mean '{nearest}'?" if nearest else '; --help lists them all'


def _default_of(entry: dataclasses.Field) -> Any:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    assert entry.default is not dataclasses.MISSING, f'option {entry.name} has no default'
    return entry.default


# ---- values


def _from_value(value: Any, kind: _Type) -> Any:
    """`value` as a config file gives it, checked against the option's type. Raises `Refused`."""
    if value is None and kind.optional:
        return None
    if kind.kind is Literal:
        for choice in kind.choices:
            if type(value) in (type(choice), kind.enum) and choice == value:
                return choice if kind.enum is None else kind.enum(choice)
        nearest = closest(value, map(str, kind.choices)) if isinstance(value, str) else None
        raise Refused(f"it must be {kind.words}" + (f"; did you mean '{nearest}'?" if nearest else ''))
    if kind.kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind.kind is list:
        items = [value] if kind.item is int and type(value) is int else value
        allowed = (int, float) if kind.item is float else (int,)
        if isinstance(items, list) and all(type(item) in allowed and math.isfinite(item) for item in items):
            return [kind.item(item) for item in items]
    if kind.kind is str and isinstance(value, str) and not _is_storable(value):
        raise Refused('it must be text without null characters and broken UTF-8')
    if type(value) is kind.kind and kind.kind in (int, bool, str):
        return value
    cure = '; use // to divide' if kind.kind is int and isinstance(value, float) else ''
    raise Refused(f'it must be {kind.words}{cure}')


def _from_text(text: str, kind: _Type) -> Any:
    """`text` as the command line gives it, read as the option's type. Raises `Refused`."""
    if text == 'None' and kind.optional:
        return None
    if kind.kind is str:
        return _from_value(text, kind)
    if kind.kind is Literal:
        return _from_value(next((choice for choice in kind.choices if str(choice) == text), text), kind)
    if kind.kind is bool:
        return _from_value({'True': True, 'true': True, 'False': False, 'false': False}.get(text, text), kind)
    if kind.kind is int and len(text) <= 30 and re.fullmatch(r'[+-]?[0-9]+(_[0-9]+)*', text):
        return _from_value(bounded(int(text)), kind)
    if kind.kind is float:
        try:
            return _from_value(float(text), kind)
        except ValueError:
            raise Refused(f'it must be {kind.words}') from None
    if kind.kind is list:
        return _from_value(_literal(text, kind), kind)
    return _from_value(text, kind)


def _literal(text: str, kind: _Type) -> Any:
    """A list written as in Python, read like the right-hand side of a config file, without names."""
    try:
        tree = parse(text.strip(), 'eval')
        check_expression(tree.body, ())
        return evaluate(tree.body, {})
    except Refused:
        raise Refused(f'it must be {kind.words}') from None


def _is_storable(text: str) -> bool:
    try:
        text.encode('utf-8')
    except UnicodeEncodeError:
        return False
    return '\0' not in text


# ---- the command line


def _split_arguments(arguments: Sequence[str], keys: _Keys,
                     problems: list[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Config file paths and (name, text) pairs in their order; arguments of another form are added to `problems`."""
    paths, texts = [], []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, text = argument.lstrip('-').partition('=')
        if name == 'config' and keys.find(name) is None and (equals or waiting):  # nanoGPT has none, many others do
            paths.append(_config_path(text if equals else waiting.pop(0)))
            continue
        if argument.startswith('--') and not argument.startswith('---') and equals and name:
            texts.append((name, text))
            words = _loose_words(waiting) if keys.is_text(name) else []
            if words:
                problems.append(f'{shown_name(" ".join(words))} on the {COMMAND_LINE}: a text of several words is put '
                                f'in quotes: --{name}="{shown_name(" ".join([text, *words]))}"')
        elif argument.startswith('-'):
            value, key = 'VALUE', keys.find(name) or name
            if not equals and waiting and not waiting[0].startswith('-') and not re.search(r'=|\.py$', waiting[0]):
                value = waiting.pop(0)  # `--key value`: one mistake, one message
            elif argument == f'--{key}' and key in keys.bare:
                texts.append((key, keys.bare[key]))
                continue
            hint = '' if keys.find(name) or equals else keys.nearest(name)
            form = f'--{key}={shown_name(text or value)}' if name.isidentifier() else '--batch_size=64'
            problems.append(f'{shown_name(argument)} on the {COMMAND_LINE}: options are written --key=value, '
                            f'here {form}{hint}')
        elif argument.endswith('.py') or not equals or not name.isidentifier() or _is_file(Path(argument)):
            paths.append(_config_path(argument))
        else:
            problems.append(f'{shown_name(argument)} on the {COMMAND_LINE}: options begin with two dashes: '
                            f'--{shown_name(argument)}')
    return paths, texts


def _loose_words(waiting: list[str]) -> list[str]:
    """Take from `waiting` the arguments at its front that are neither options nor config files."""
    words = []
    while waiting and not re.match('-|.*=', waiting[0]) and not waiting[0].endswith('.py') \
            and not _is_file(_config_path(waiting[0])):
        words.append(waiting.pop(0))
    return words


def _config_path(text: str) -> Path:
    """The config file that `text` means: as it is, with backslashes or `~`, or one of `CONFIGS` by its name."""
    written = Path(os.path.expanduser(text))
    slashes = text.replace('\\', '/')
    for path in (written, Path(slashes), CONFIGS.parent / slashes, CONFIGS / slashes, CONFIGS / f'{slashes}.py'):
        if text and _is_file(path):
            return path
    return written


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


# ---- config files


class _FileReader:
    """Reads config files one after another into `values`; keys set on the command line keep their value."""

    def __init__(self, keys: _Keys, values: dict[str, Any], readable: dict[str, object], explicit: dict[str, str],
                 problems: list[str], resolve_device: Callable[[str], str] | None) -> None:
        self.keys, self.values, self.readable, self.explicit = keys, values, readable, explicit
        self.problems, self.resolve_device = problems, resolve_device
        self.pinned = frozenset(explicit)
        self.notes: list[str] = []
        self.path = ''
        self.set_here: dict[str, Any] = {}  # key -> value, as assigned by the present file
        self.conditions: dict[str, Any] = {}  # names that the present `if` has read -> value

    def see_device(self, where: str) -> None:
        """Let config files read the device that the option means."""
        if self.resolve_device is None or 'device' not in self.values:
            return
        try:
            self.readable['device'] = self.resolve_device(self.values['device'])
        except UserError as error:
            self.problems.append(f'device={shown(self.values["device"])} ({where}): {one_line(str(error))}')

    def read(self, path: Path, above: tuple[Path, ...] = ()) -> None:
        """Run a config file, its base first; above: the files that it is a base of."""
        shown_path = shown_name(path)
        try:
            tree = parse(_read_text(path), 'exec')
            statements = tree.body[1:] if ast.get_docstring(tree, clean=False) is not None else tree.body
            base = _base_of(statements)
            if base is not None and _is_file(base) and any(base.samefile(one) for one in (*above, path)):
                raise Refused(f'{BASE} = {shown(str(base))}: no config file is its own base; name another')
            if base is not None:
                self.read(base, (*above, path))
            self.path, self.set_here = shown_path, {}
            self.block(statements if base is None else statements[1:], taken=True, depth=0)
        except Refused as refused:
            self.problems.append(f'{shown_path}: {refused}')
        except RecursionError:
            self.problems.append(f'{shown_path}: statements are nested too deeply')

    def block(self, statements: list[ast.stmt], taken: bool, depth: int) -> None:
        """Run statements. If `taken` is False, they are only checked, as far as possible, and change nothing."""
        for statement in statements:
            try:
                if isinstance(statement, ast.Assign):
                    self.assign(statement, taken)
                elif isinstance(statement, ast.If):
                    self.condition(statement, taken, depth)
                else:
                    raise Refused(f'found {name_of(statement)}; '
                                  'a config file holds key = value and if / elif / else only')
            except Refused as refused:
                self.problems.append(f'{self.path}:{statement.lineno}: {refused}')

    def assign(self, statement: ast.Assign, taken: bool) -> None:
        check_expression(statement.value, self.readable.keys() | self.keys.aliases.keys())
        constant = not any(isinstance(node, ast.Name) for node in ast.walk(statement.value))
        value = evaluate(statement.value, self.lookup()) if taken or constant else None
        for target in statement.targets:
            if not isinstance(target, ast.Name):
                raise Refused(f'found {name_of(target)} on the left of =; write one key = value a line')
            if target.id == BASE:
                raise Refused(f"{BASE} is the first line of a config file: {BASE} = 'config/other.py'")
            key = self.keys.find(target.id)
            if key is None:
                raise Refused(f"no such option '{shown_name(target.id)}'{self.keys.nearest(target.id)}")
            if not (taken or constant):
                continue
            try:
                checked = _from_value(value, self.keys.types[key])
            except Refused as refused:
                raise Refused(f'{target.id} = {shown(value)}: {refused}') from None
            if taken and key not in self.pinned:
                self.set(key, checked, f'{self.path}:{statement.lineno}')

    def set(self, key: str, value: Any, where: str) -> None:
        self.values[key] = self.readable[key] = self.set_here[key] = value
        self.explicit[key] = where
        if key == 'device':
            self.see_device(where)

    def lookup(self) -> dict[str, object]:
        return self.readable | {alias: self.readable[key] for alias, key in self.keys.aliases.items()}

    def condition(self, statement: ast.If, taken: bool, depth: int) -> None:
        before = dict(self.set_here)
        if depth == 0:
            self.conditions = {}
        undecided, branch = taken, statement
        while True:
            holds = self.test(branch, undecided)
            self.block(branch.body, undecided and holds is True, depth + 1)
            undecided = undecided and holds is False  # a wrong condition takes no branch
            if len(branch.orelse) == 1 and isinstance(branch.orelse[0], ast.If):
                branch = branch.orelse[0]
                continue
            self.block(branch.orelse, undecided, depth + 1)
            break
        changes = [f'{key} {shown(old)} -> {shown(self.set_here[key])}' for key, old in before.items()
                   if self.set_here[key] != old]
        if depth == 0 and changes:
            reasons = ' and '.join(f'{name} is {shown(value)}' for name, value in self.conditions.items()) or 'always'
            self.notes.append(f'{self.path}: {reasons}, so {", ".join(changes)}')

    def test(self, branch: ast.If, needed: bool) -> bool | None:
        """Whether the branch's condition holds; None where it is not needed or wrong, which is then reported."""
        try:
            check_expression(branch.test, self.readable.keys() | self.keys.aliases.keys())
            if not needed:
                return None
            names = self.lookup()
            holds = bool(evaluate(branch.test, names))
            for node in ast.walk(branch.test):
                if isinstance(node, ast.Name):
                    self.conditions.setdefault(node.id, names[node.id])
            return holds
        except Refused as refused:
            self.problems.append(f'{self.path}:{branch.lineno}: {refused}')
            return None


def _base_of(statements: list[ast.stmt]) -> Path | None:
    """The config file that the first of the statements names as the base; None where it says something else."""
    match statements[:1]:
        case [ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text)))] if name == BASE:
            return _config_path(text)
    return None


def _read_text(path: Path) -> str:
    """The text of a config file. Raises `Refused`."""
    if not _is_file(path):
        raise Refused(f'there is no such config file{_nearest_file(path)}')
    try:
        with path.open('rb') as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise Refused(f'the file cannot be read ({error.strerror})') from None
    if len(content) > LARGEST_FILE:
        raise Refused(f'the file has more than {LARGEST_FILE} bytes, too many for a config file')
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = content[:error.start].count(10) + 1
        raise Refused(f'line {line}: the file is not UTF-8 text; save it as UTF-8') from None


def _nearest_file(path: Path) -> str:
    try:
        nearest = closest(path.stem, [entry.stem for entry in path.parent.glob('*.py')])
    except (OSError, ValueError):
        nearest = None
    if nearest:
        return f'; did you mean {shown_name(path.with_name(nearest + ".py"))}?'
    return '' if path.suffix == '.py' else '; options are written --key=value'
