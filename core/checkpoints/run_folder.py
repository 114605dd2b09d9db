"""A run's folder. One run at a time writes to it, and its newest usable checkpoint is always found.

ckpt.pt is the latest checkpoint, ckpt_previous.pt the one before, ckpt_best.pt the one with the lowest validation
value, ckpt_<label>_<iteration>.pt the last snapshots. environment.json and config.json record what made them.

A run's folder has its marker, run.json. The run owns only the files there whose names match OWN. A run from scratch in
the folder of an earlier run moves nothing before its own first checkpoint is on the disk. Then the earlier run's files
go into a new folder earlier_run_<date>_<time>, which the program never touches again.
"""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from core.checkpoints.checkpoint import HOW_TO_TRAIN, Checkpoint, CheckpointSummary, save_checkpoint, verify_checkpoint
from core.checkpoints.environment import environment
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.sharing import WEIGHTS_FILE
from core.common.errors import UserError
from core.common.expressions import excerpt, shown_names
from core.common.files import TEMPORARY_SUFFIX, own_stream, sync_folder, temporary_name, unwritable, write_whole
from core.common.locks import take

LATEST, PREVIOUS, BEST = 'ckpt.pt', 'ckpt_previous.pt', 'ckpt_best.pt'
CONFIG, ENVIRONMENT, METRICS, PICTURE = 'config.json', 'environment.json', 'metrics.jsonl', 'loss.png'
LOCK_FILE = 'run.lock'
MARKER, PROGRAM, FOLDER_FORMAT = 'run.json', 'masked-diffusion-gpt', 1
EARLIER_RUN = 'earlier_run'  # the start of the name of the folder that a replaced run is moved to

_SNAPSHOT = rf'ckpt_(?:{"|".join(CheckpointKind)})[a-z_]*_\d+\.pt'
_CHECKPOINT = re.compile(rf'ckpt(_previous|_best)?\.pt|{_SNAPSHOT}')
OWN = re.compile(rf'(?:{_CHECKPOINT.pattern})(\.damaged\d*)?|config\.json|environment\.json|metrics\.jsonl|loss\.png')
_TEMPORARY = re.compile(rf'(?:{OWN.pattern}|run\.json)(\.\w+{re.escape(TEMPORARY_SUFFIX)})+')


class RunFolder:
    """The folder at `path`, made if it is missing. This process holds it until `close`, or until the process ends.

    UserError if another process holds it, it is not writable, or it holds files that are not a run's. With `resume` it
    must hold a run. Of several ranks only the one that writes opens it. Before the first save, call `begin`, or
    `latest` and `write_description`.
    """

    def __init__(self, path: Path | str, resume: bool = False) -> None:
        self.path = Path(path)
        self._earlier: list[str] = []        # files of a run that this one will replace
        self._waiting: dict[str, Path] = {}  # temporary paths of this run's files, by final name
        self._holding_back = False           # whether files wait until the first checkpoint is complete
        require_run(self.path, resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            self._hold()
            moves = (_read_marker(self.path) or {}).get('moves', [])
            if moves:
                self._make(moves)
            for stale in self.path.iterdir():
                if _TEMPORARY.fullmatch(stale.name):
                    stale.unlink()
        except OSError as error:
            self.close()
            raise unwritable(self.path, error) from error
        except UserError:
            self.close()
            raise

    def _hold(self) -> None:
        """Lock the folder, and write this process's id into the lock. UserError if another run holds the folder."""
        if not take(self._lock, self.path):
            with suppress(OSError):  # on Windows nobody can read a locked file
                holder = os.read(self._lock, 32).decode(errors='replace').strip()
            raise UserError(f'{self.path} is in use by another run (process {holder or "unknown"}); wait for it, or '
                            f'choose another folder with --out_dir=...')
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f'{os.getpid()}\n'.encode())

    def close(self) -> None:
        """Release the folder. If this run never saved, an earlier run stays as it was."""
        for path in self._waiting.values():
            with suppress(OSError):
                path.unlink()
        self._waiting = {}
        os.close(self._lock)

    def __enter__(self) -> 'RunFolder':
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    # ---- beginning and going on

    def begin(self, config: Mapping[str, object], overwrite: bool = False) -> None:
        """Begin a run from scratch with the options `config`. UserError if an earlier run has saved something, unless
        `overwrite`. The first save of this run moves the earlier run's files aside."""
        files = sorted(one.name for one in self.path.iterdir() if OWN.fullmatch(one.name))
        saved = [name for name in files if _CHECKPOINT.fullmatch(name)]
        if saved and not overwrite:
            resume = 'go on with it (--init_from=resume), ' if {LATEST, PREVIOUS} & {*saved} else ''
            raise UserError(f'{self.path} holds an earlier run ({shown_names(saved)}); {resume}choose another folder '
                            f'(--out_dir=...), or start again here and keep it under a dated name (--overwrite=True)')
        metrics = self.path / METRICS
        if saved or metrics.exists() and metrics.stat().st_size:
            self._earlier, self._holding_back = files, True
        self.write_description(config)

    def latest(self, say: Callable[[str], None]) -> Path:
        """As `latest_checkpoint`. A damaged file is renamed to <name>.damaged, so that no save keeps it."""
        summary, damaged = _newest(self.path, say)
        if (self.path / BEST).exists() and not _is_whole(self.path / BEST, say):
            damaged.append(self.path / BEST)
        for path in damaged:
            os.replace(path, _free(path.with_name(f'{path.name}.damaged')))
        return summary.path

    def write_description(self, config: Mapping[str, object]) -> None:
        """Write config.json (`config`, the run's options), environment.json (of `environment`) and the marker."""
        if not self._earlier:
            self._write_marker()
        for name, values in ((CONFIG, config), (ENVIRONMENT, environment())):
            write_whole(self.place(name), json.dumps(values, indent=2, ensure_ascii=False) + '\n')

    def place(self, name: str) -> Path:
        """The path where this run writes its file `name` now. In the folder of an earlier run it is a temporary path
        until the first save."""
        if not self._holding_back:
            return self.path / name
        return self._waiting.setdefault(name, temporary_name(self.path / name))

    @property
    def replaces(self) -> bool:
        """Whether an earlier run's files are still in their places."""
        return bool(self._earlier)

    def has_best(self) -> bool:
        """Whether this run has a best checkpoint."""
        return not self._earlier and (self.path / BEST).exists()

    # ---- saving

    def save(self, latest: Checkpoint, best: Checkpoint | None = None, snapshot: Checkpoint | None = None,
             label: str = '', keep: int = 1) -> Path | None:
        """Save `best` as ckpt_best.pt, `snapshot` as ckpt_<label>_<iteration>.pt, and finally `latest` as ckpt.pt.

        The old ckpt.pt becomes ckpt_previous.pt after the new one is verified. The last `keep` (at least 1) snapshots
        of the label stay. The files of a first save get their names together: a kill leaves all of them or none.
        Returns the folder that an earlier run's files were moved to; None if there were none.
        """
        assert keep >= 1 and re.fullmatch(r'\w*', label)
        self._holding_back |= not (self.path / LATEST).exists()
        aside: Path | None = None
        names = {BEST: best, f'ckpt_{label}_{latest.iteration}.pt': snapshot}
        for name, checkpoint in names.items():
            if checkpoint is not None:
                save_checkpoint(self.place(name), checkpoint.to_payload())
        if self._holding_back:
            save_checkpoint(self.place(LATEST), latest.to_payload())
            aside = self._settle_all()
        else:
            self._rotate(latest)
        if snapshot is not None:
            older = [one for one in self.snapshots(label) if one.name not in names]
            for one in older[:max(0, len(older) - (keep - 1))]:
                one.unlink(missing_ok=True)
        return aside

    def _rotate(self, latest: Checkpoint) -> None:
        path, arriving = self.path / LATEST, temporary_name(self.path / LATEST)
        try:
            save_checkpoint(arriving, latest.to_payload())
            if path.exists():
                os.replace(path, self.path / PREVIOUS)
            os.replace(arriving, path)
            sync_folder(self.path)
        except OSError as error:
            with suppress(OSError):
                arriving.unlink(missing_ok=True)
            raise unwritable(path, error) from error

    def _settle_all(self) -> Path | None:
        """Move an earlier run's files aside and this run's files to their places. Returns the earlier files' folder.

        All moves are first recorded in the marker. After a kill, the next process that opens the folder completes them.
        """
        aside, displaced = _free(self.path / f'{EARLIER_RUN}_{time.strftime("%Y-%m-%d_%H%M%S")}'), bool(self._earlier)
        try:
            if displaced:
                aside.mkdir()
            moves = [[name, f'{aside.name}/{name}'] for name in self._earlier]
            moves += [[path.name, name] for name, path in self._waiting.items() if path.exists()]
            self._write_marker(moves)
            self._make(moves)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._earlier, self._waiting, self._holding_back = [], {}, False
        return aside if displaced else None

    def _make(self, moves: list[list[str]]) -> None:
        """Make the moves that are not made yet. The move of an earlier run's file is made if its target exists. The
        move of this run's file is made if its source is gone."""
        for source, target in moves:
            made = os.path.lexists(self.path / target) if '/' in target else not os.path.lexists(self.path / source)
            if not made and os.path.lexists(self.path / source):
                _move(self.path / source, self.path / target)
        for folder in {(self.path / target).parent for _, target in moves}:
            sync_folder(folder)
        self._write_marker()

    def _write_marker(self, moves: list[list[str]] | None = None) -> None:
        marker = {'program': PROGRAM, 'format': FOLDER_FORMAT, **({'moves': moves} if moves else {})}
        write_whole(self.path / MARKER, json.dumps(marker, indent=1) + '\n')

    def snapshots(self, label: str) -> list[Path]:
        """The snapshots of `label`, by iteration."""
        numbered = [(int(match[1]), one) for one in self.path.iterdir()
                    if (match := re.fullmatch(rf'ckpt_{label}_(\d+)\.pt', one.name))]
        return [one for _, one in sorted(numbered)]


# ---- whose folder it is

def require_run(path: Path, resume: bool) -> None:
    """UserError unless `path` holds a run. Without `resume` it may also be empty or missing."""
    if not path.exists():
        if resume:
            raise UserError(f'there is no run folder {path} to resume from; name another one with --out_dir=..., or '
                            f'start a run with: {HOW_TO_TRAIN}')
        return
    if not path.is_dir():
        raise UserError(f'cannot write into {path}: it is a file; choose another folder with --out_dir=...')
    if _read_marker(path) is not None:
        return
    names = sorted(one.name for one in path.iterdir() if one.name != LOCK_FILE and not _TEMPORARY.fullmatch(one.name)
                   and own_stream(one) is None)  # with `train.py > out/log.txt` the log exists already
    foreign = _foreign_descriptions(path)
    described = not foreign and (path / CONFIG).exists() and (path / ENVIRONMENT).exists()
    if described or (not names and not resume):
        return
    whole = any(_is_whole(path / name) for name in (LATEST, PREVIOUS, BEST))
    if whole and not foreign:
        return
    if resume and not whole:
        _newest(path, lambda line: None)  # raises an error that tells what is wrong
    raise UserError(f'{path} holds files that no run of this program wrote ({shown_names(foreign or names)}), so it is '
                    f'left alone; choose a new or an empty folder with --out_dir=...')


def _read_marker(path: Path) -> dict[str, object] | None:
    """The content of run.json in `path`; None if there is none. UserError if it is damaged or another program's."""
    marker = path / MARKER
    if not marker.exists():
        return None
    try:
        values = json.loads(marker.read_bytes())
        if values['program'] != PROGRAM or type(values['format']) is not int:
            raise ValueError('it names another program')
        moves = values.get('moves', [])
        if not all(_is_move(source, target) for source, target in moves):
            raise ValueError('its moves are not those of a run')
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f'{marker} is damaged or of another program ({excerpt(str(error))}), so {path} is left alone; '
                        f'choose another folder with --out_dir=..., or move {marker} away if the folder is a run\'s'
                        ) from error
    if values['format'] > FOLDER_FORMAT:
        raise UserError(f'{path} is a run folder of format {values["format"]}, but this program knows format '
                        f'{FOLDER_FORMAT}; update it, or choose another folder with --out_dir=...')
    return values


def described_by(folder: Path) -> Path:
    """The path of config.json of the run in `folder`. It is the temporary path if a kill interrupted the first save."""
    moves = (_read_marker(folder) or {}).get('moves', [])
    waiting = [folder / source for source, target in moves if target == CONFIG and (folder / source).exists()]
    return waiting[0] if waiting else folder / CONFIG


def _is_move(source: str, target: str) -> bool:
    """Whether a run that replaces another one makes this move: an old file aside, or a new file to its place."""
    aside, _, name = target.rpartition('/')
    if aside:
        return name == source and bool(OWN.fullmatch(name) and re.fullmatch(rf'{EARLIER_RUN}_[\w-]+', aside))
    return bool(OWN.fullmatch(name) and _TEMPORARY.fullmatch(source))


def _move(source: Path, target: Path) -> None:
    """Rename. A relative symbolic link still leads to the same file."""
    if source.parent == target.parent or not source.is_symlink() or os.path.isabs(os.readlink(source)):
        os.replace(source, target)
    else:
        target.symlink_to(os.path.join(os.path.relpath(source.parent, target.parent), os.readlink(source)))
        source.unlink()


def _foreign_descriptions(path: Path) -> list[str]:
    """Files in `path` that have a run's names, but visibly not a run's contents."""
    foreign = [name for name, keys in ((CONFIG, {'out_dir', 'dataset', 'n_layer'}),
                                       (ENVIRONMENT, {'versions', 'command_line'}))
               if (path / name).exists() and not keys <= set(read_json(path / name) or ())]
    metrics = path / METRICS
    if metrics.exists():
        with suppress(OSError):
            first = metrics.read_bytes().split(b'\n', 1)[0]
            foreign += [METRICS] if first and b'"iteration"' not in first else []
    elif (path / PICTURE).exists():
        foreign.append(PICTURE)
    return foreign


def read_json(path: Path) -> dict[str, object] | None:
    """The object in the JSON file at `path`; None if there is no object."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return None
    return values if isinstance(values, dict) else None


def _is_whole(path: Path, say: Callable[[str], None] = lambda line: None) -> bool:
    try:
        return verify_checkpoint(path) is not None
    except UserError as error:
        say(str(error).splitlines()[0])
        return False


def _free(path: Path) -> Path:
    """`path` if it is free, otherwise the first free one of path2, path3 ..."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f'{path.name}{"_" if path.name.startswith(EARLIER_RUN) else ""}{number}')
    return free


# ---- finding checkpoints

def find_checkpoint(out_dir: Path | str, name: str, given: bool) -> tuple[Path, list[str]]:
    """The path of the checkpoint `name`, and lines to print about it. given: the user named it.

    It is a file or an exported folder in out_dir, or any other path. If the user named none, out_dir may itself be an
    exported folder. A run without a best checkpoint then gives its latest one. UserError if there is no checkpoint.
    """
    folder = Path(out_dir)
    path = folder / name
    if path.exists():
        return path, []
    if not given and (folder / WEIGHTS_FILE).is_file():
        return folder, []
    if not given and (folder / LATEST).is_file():
        return folder / LATEST, [f'there is no {path}, so the latest checkpoint, {folder / LATEST}, is taken']
    if given and Path(name).exists():
        return Path(name), []
    if folder.is_file():
        raise UserError(f'out_dir is {folder}, a file; give its folder and its name apart: --out_dir={folder.parent} '
                        f'--checkpoint_name={folder.name}')
    there = sorted(one.name for one in folder.glob('*.pt')) if folder.is_dir() else []
    if there:
        raise UserError(f'there is no checkpoint {path}; {folder} has {shown_names(there)}: name one with '
                        f'--checkpoint_name={LATEST if LATEST in there else there[0]}')
    raise UserError(f'there is no checkpoint {path}; name its folder with --out_dir=..., or make one with: '
                    f'{HOW_TO_TRAIN}, or with the config that writes into {folder}')


def latest_checkpoint(folder: Path | str, say: Callable[[str], None]) -> Path:
    """The checkpoint to resume from: the one of ckpt.pt and ckpt_previous.pt that is undamaged and has more iterations.

    The iteration inside the file counts, not its date. say: prints a line if a damaged file was left out. UserError if
    neither can be used.
    """
    return _newest(Path(folder), say)[0].path


def _newest(folder: Path, say: Callable[[str], None]) -> tuple[CheckpointSummary, list[Path]]:
    """The summary of the newest usable checkpoint, and the damaged files of the folder."""
    usable, damaged, problems = [], [], []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            usable.append(verify_checkpoint(path))
        except UserError as error:
            damaged.append(path)
            problems.append(str(error))
    if not usable:
        raise UserError('\n'.join(problems) or _nothing_to_resume(folder))
    resumable = [summary for summary in usable if summary.resumable]
    if usable[0] not in resumable:
        path, other = usable[0].path, next(iter(resumable), None)
        raise UserError(f'{path} holds weights to sample from, and no state of a run (it was a best checkpoint, a '
                        f'snapshot or a merged model): a run cannot go on from it; start one from its weights with '
                        f'--init_from_checkpoint={path} --out_dir=...'
                        + (f', or move it away to go on from {other.path} (iteration {other.iteration})'
                           if other else ''))
    newest = max(resumable, key=lambda summary: summary.iteration)  # ckpt.pt if both are equal
    for problem in problems:
        say(f'{problem.splitlines()[0]}; going on from {newest.path} (iteration {newest.iteration})')
    return newest, damaged


def _nothing_to_resume(folder: Path) -> str:
    if (folder / WEIGHTS_FILE).exists():
        return (f'{folder} is an exported model, which has no state of a run; start a run from its weights with '
                f'--init_from_checkpoint={folder} --out_dir=...')
    if (folder / BEST).exists():
        return (f'there is no {LATEST} in {folder} to resume from, and {BEST} holds weights alone; start a run from '
                f'them with --init_from_checkpoint={folder / BEST} --out_dir=...')
    return f'there is no checkpoint in {folder} to resume from; make one with: {HOW_TO_TRAIN}'
