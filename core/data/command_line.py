"""The arguments of data/*/prepare.py, and the line that reports what was prepared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.common.errors import raise_problems
from core.common.expressions import closest, shown_name
from core.common.printing import say
from core.data.corpus import Corpus


@dataclass(frozen=True)
class Arguments:
    """Plain arguments, the value of every option, and the names of the options and flags that were given."""

    plain: list[str]
    options: dict[str, str | None]
    named: frozenset[str]

    def has(self, flag: str) -> bool:
        return flag in self.named


def read_arguments(arguments: Sequence[str], defaults: Mapping[str, str | None], usage: str, *,
                   plain: int | None = 0, flags: Sequence[str] = ()) -> Arguments:
    """Split `--key=value`, `--key value`, `--flag` and at most `plain` other arguments (None: any number).

    `--help` prints `usage` and exits with code 0. UserError lists what is unknown, missing, empty or too much.
    """
    if any(argument in ('--help', '-h') for argument in arguments):
        say(usage.strip())
        raise SystemExit(0)
    found, options, problems, named = [], dict(defaults), [], set()
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith('-') or argument == '-':
            found.append(argument)
            continue
        key, equals, value = argument.lstrip('-').partition('=')
        if key in flags:
            if value not in ('', 'True', 'False'):
                problems.append(f'--{key} is given alone, or as --{key}=True')
            if value != 'False':
                named.add(key)
        elif key not in defaults or not argument.startswith('--'):
            near = closest(key, [*defaults, *flags])
            meant = f'; did you mean --{near}? The' if near else ': the'
            problems.append(f'{shown_name(argument)} is unknown{meant} options '
                            f'are {", ".join("--" + known for known in [*defaults, *flags])}')
        elif key in named:
            problems.append(f'--{key} is given more than once: give it once')
        elif not equals and not remaining or not (value if equals else remaining[0]).strip():
            problems.append(f'--{key} needs a value: --{key}=VALUE')
            named.add(key)
            remaining = remaining[not equals:]
        else:
            named.add(key)
            options[key] = value if equals else remaining.pop(0)
    problems += ['an empty name is given: is a variable of the shell unset?'] * any(not one.strip() for one in found)
    if plain is not None and len(found) > plain:
        problems.append(f'{shown_name(" ".join(found[plain:]))} is one argument too much: '
                        f'{f"{plain} and options" if plain else "only options"} can be given')
    raise_problems(problems)
    return Arguments(found, options, frozenset(named))


def summary(corpus: Corpus) -> str:
    """One line: where the corpus is and how large its parts are."""
    sizes = ', '.join(f'{split} {size:,}' for split, size in corpus.sizes.items())
    return (f'{corpus.folder}: {sizes} tokens of a vocabulary of {corpus.vocabulary.base_size} '
            f'({corpus.vocabulary.kind}), {corpus.dtype}')
