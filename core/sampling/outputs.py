"""The files that a sampling run writes. They are checked before the work, written as texts are finished, and saved
before anything is printed."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from core.common.errors import UserError
from core.common.files import NewFile, unwritable, why_unwritable, write_whole
from core.sampling.options import SampleConfig
from core.sampling.picture import MOVING, STILL, write_picture
from core.sampling.replay import write_html
from core.sampling.result import SamplingResult

RECORDINGS = ('save_json', 'save_html', 'save_gif')  # of every step
OUTPUTS = ('output_file', *RECORDINGS)
KEPT = 10_000  # most samples whose texts and steps are held in memory; with more, texts go out as they are finished


def holds_all(config: SampleConfig) -> bool:
    """Whether all samples stay in memory until the end."""
    return config.num_samples <= KEPT


def records(config: SampleConfig) -> bool:
    """Whether a file is to hold the steps of the run."""
    return any(getattr(config, option) is not None for option in RECORDINGS)


def output_problems(config: SampleConfig) -> list[str]:
    """A sentence for each output file that could not be written. Changes no file."""
    asked = {option: getattr(config, option) for option in OUTPUTS if getattr(config, option) is not None}
    problems = [f'{option} is {path!r}, but {reason}' for option, path in asked.items()
                if (reason := why_unwritable(path)) is not None]
    if 'save_gif' in asked and not problems and Path(asked['save_gif']).suffix.lower() not in (MOVING, STILL):
        problems.append(f'save_gif is {asked["save_gif"]!r}, but must end in {MOVING} for a moving picture or in {STILL} '
                        f'for a strip of a few steps')
    if not problems:
        problems = _shared_places({'checkpoint_name': Path(config.out_dir) / config.checkpoint_name,
                                   **{option: Path(path) for option, path in asked.items()}})
    if not holds_all(config):
        problems += [f'{option} holds every step of every sample, but num_samples is {config.num_samples}; take at '
                     f'most {KEPT} with it, or only output_file'
                     for option in RECORDINGS if option in asked]
    return problems


def _shared_places(paths: Mapping[str, Path]) -> list[str]:
    """A sentence for each file that two options name; a device may take several."""
    taken: dict[str, str] = {}
    problems = []
    for option, path in paths.items():
        if path.is_file() or not path.exists():
            other = taken.setdefault(os.path.realpath(path), option)
            if other != option:
                problems.append(f'{option} is {str(path)!r}, but {other} names the same file; choose another name')
    return problems


class Outputs:
    """The asked files. Texts are written to a temporary file as they come; `save` gives it its name and writes the
    others; `discard` leaves everything as it was."""

    def __init__(self, config: SampleConfig, decode: Callable[[list[int]], str]) -> None:
        self._config, self._decode = config, decode
        self._texts: NewFile | None = None

    def add(self, texts: Sequence[str]) -> None:
        """Write the texts of a finished batch."""
        path = self._config.output_file
        if path is None or not texts:
            return
        try:
            between = b''
            if self._texts is None:
                self._texts = NewFile(Path(path))
            else:
                between = b'\n\n'
            self._texts.file.write(between + '\n\n'.join(texts).encode())
            self._texts.file.flush()
        except OSError as error:
            raise unwritable(Path(path), error) from error

    def save(self, result: SamplingResult) -> list[str]:
        """Write all files, and return the lines that say so. If some fail, the others are still written, and UserError
        names those that failed."""
        config, said, problems = self._config, [], []
        for path, words, write in ((config.output_file, 'texts written to {}', self._finish_texts),
                                   (config.save_json, 'run written to {}', self._write_json),
                                   (config.save_html, 'replay written to {}; open it in a browser', self._write_html),
                                   (config.save_gif, 'picture written to {}', self._write_picture)):
            if path is None:
                continue
            try:
                said.append(words.format(path) + (write(Path(path), result) or ''))
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError('\n'.join(problems))
        return said

    def discard(self) -> None:
        """Give up what was not saved."""
        if self._texts is not None:
            self._texts.discard()

    def _finish_texts(self, path: Path, _: SamplingResult) -> None:
        assert self._texts is not None
        try:
            self._texts.file.write(b'\n')
            self._texts.finish()
            self._texts.settle()
        except OSError as error:
            raise unwritable(path, error) from error
        finally:
            self._texts.discard()

    def _write_json(self, path: Path, result: SamplingResult) -> None:
        write_whole(path, json.dumps(result.to_builtins(self._decode), ensure_ascii=False) + '\n')

    def _write_html(self, path: Path, result: SamplingResult) -> None:
        write_html(result.trace, self._decode, path)

    def _write_picture(self, path: Path, result: SamplingResult) -> str:
        return write_picture(result.trace, self._decode, path)
