"""What evaluate.py does: check the options, load checkpoint and corpus, compute what the cache lacks, report it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from configurator import bound_problems
from core.checkpoints.checkpoint import Checkpoint, checkpoint_hash, load_checkpoint
from core.checkpoints.heads import started_heads
from core.checkpoints.kinds import CheckpointKind
from core.checkpoints.run_folder import find_checkpoint
from core.checkpoints.weights import build_model, model_config_to_dict
from core.common.drawing import allowed_ids
from core.common.errors import UserError, raise_problems
from core.common.expressions import unknown_choice
from core.common.files import NewFile, unwritable
from core.common.printing import say
from core.common.progress import ProgressBar
from core.common.runtime import DTYPES, Runtime, resolve_device, use_precision
from core.common.typed_json import FARTHEST
from core.data.folders import recorded_data_folder
from core.data.prepare import ensure_corpus
from core.data.vocabulary import Vocabulary
from core.evaluation.arena import ARENA, SUMMARY
from core.evaluation.error_detection import ERRORS
from core.evaluation.likelihood import LIKELIHOOD
from core.evaluation.measure import CACHE_NAME, Cell, Evaluation, Measure, Result, ResultCache
from core.evaluation.nelbo import NELBO
from core.evaluation.options import EvaluateConfig
from core.evaluation.quality import QUALITY_MEASURES
from core.pretrained.head_file import load_with_head
from core.pretrained.loading import Source, pretrained_problems
from core.pretrained.text import read_text, text_corpus

PRETRAINED_FOLDER = 'out-pretrained'  # where results of pretrained models go
USUAL_WINDOWS = 64  # of their texts

# Measures -----------------------------------------------------------------------------------------------------------

MEASURES: dict[str, Measure] = {
    'nelbo': NELBO,
    'likelihood': LIKELIHOOD,
    'errors': ERRORS,
    **QUALITY_MEASURES,
}


def measure_help() -> str:
    """One line per measure for --help."""
    summaries = {**{name: measure.summary for name, measure in MEASURES.items()}, ARENA: SUMMARY}
    return '\n'.join(['measures:', *(f'  {name:<12} {summary}' for name, summary in summaries.items())])


# The run ------------------------------------------------------------------------------------------------------------

def run_evaluation(config: EvaluateConfig, explicit: Mapping[str, str],
                   say: Callable[[str], None] = say) -> dict[str, list[Result]]:
    """Measure as `config` says; `explicit` names the options given. Returns the rows of every measure by its name."""
    raise_problems(option_problems(config, explicit))
    evaluation = load_evaluation(config, explicit, say)
    _require_place(evaluation.out_dir / CACHE_NAME, config)
    cache, found = ResultCache(evaluation.out_dir / CACHE_NAME, say), {}
    torch.set_flush_denormal(evaluation.runtime.device.type == 'cpu')  # denormal numbers are a hundred times slower
    try:
        for name in MEASURES if config.measure == 'all' else (config.measure,):
            measure = MEASURES[name]
            try:
                cells = measure.cells(evaluation)
            except UserError as error:
                if config.measure != 'all':
                    raise
                say(f'{name} is left out: {error}')
                continue
            found[name] = compute_cells(evaluation, cache, name, cells)
            rows = found[name] if measure.arrange is None else measure.arrange(found[name])
            for line in table(name, measure.columns, rows):
                say(line)
            if measure.finish is not None:
                measure.finish(evaluation, found[name])
    finally:
        torch.set_flush_denormal(False)
    say(f'results are kept in {cache.path}')
    return found


def _require_place(results: Path, config: EvaluateConfig) -> None:
    """Check before the work: UserError if its results could not be written."""
    try:
        NewFile(results).discard()
    except OSError as error:
        checkpoint = Path(config.out_dir).absolute() / config.checkpoint_name
        raise UserError(f'results are kept in {results}, which cannot be written ({error.strerror or error}); keep '
                        f'them elsewhere: --out_dir=FOLDER --checkpoint_name={checkpoint}') from error


def measured_rows(config: EvaluateConfig, explicit: Mapping[str, str], say: Callable[[str], None]) -> list[Result]:
    """The rows of one measure of one checkpoint. Known results come from its cache. The rows are not printed."""
    say(f'{config.measure} of {config.out_dir}/{config.checkpoint_name}')
    evaluation = load_evaluation(config, explicit, say)
    cache = ResultCache(evaluation.out_dir / CACHE_NAME, say)
    torch.set_flush_denormal(evaluation.runtime.device.type == 'cpu')
    try:
        return compute_cells(evaluation, cache, config.measure, MEASURES[config.measure].cells(evaluation))
    finally:
        torch.set_flush_denormal(False)


def option_problems(config: EvaluateConfig, explicit: Mapping[str, str]) -> list[str]:
    """Messages about wrong options; no file is read."""
    problems = bound_problems(config)
    problems += unknown_choice('measure', config.measure, (*MEASURES, ARENA, 'all'))
    if config.windows is not None and config.windows < 2:
        problems.append(f'windows is {config.windows}, but a standard error needs at least 2')
    if config.report is not None and config.measure not in ('policies', ARENA, 'all'):
        problems.append(f'report was given, but measure={config.measure} writes no page; take measure=policies, '
                        f'measure=arena, or leave report out')
    if config.checkpoints is not None and config.measure != ARENA:
        problems.append(f'checkpoints was given, but measure={config.measure} is of one checkpoint; take '
                        f'measure=arena, or checkpoint_name')
    guided = config.measure in ('quality', 'curves') and 'model' in (config.guidance or '').split(',')
    if config.remasking_checkpoint_name is not None and config.measure not in ('errors', 'all') and not guided:
        problems.append(f'remasking_checkpoint_name does not apply to measure={config.measure}; take measure=errors, '
                        f'or measure=quality or curves with guidance=model, or leave it out')
    problems += pretrained_problems(config, explicit)
    if config.model is not None and config.text_file is None:
        problems.append('model is given, but no text; add --text_file=FILE')
    if config.model is not None and config.remasking_checkpoint_name is not None:
        problems.append('remasking_checkpoint_name does not apply to model, which has another vocabulary than '
                        'checkpoints of this program; leave it out')
    return problems


def load_evaluation(config: EvaluateConfig, explicit: Mapping[str, str], say: Callable[[str], None]) -> Evaluation:
    """Load the checkpoint and its corpus, or the pretrained model and its text. UserError if they do not fit each
    other."""
    device = torch.device(resolve_device(config.device))
    use_precision(device, config.dtype)
    if config.model is not None:
        return load_pretrained_evaluation(config, explicit, device, say)
    out_dir = Path(config.out_dir)
    path, found = find_checkpoint(out_dir, config.checkpoint_name, 'checkpoint_name' in explicit)
    for line in found:
        say(line)
    checkpoint = load_checkpoint(path)
    if not CheckpointKind(checkpoint.kind).writes_text:
        raise UserError(f'{path} is a checkpoint of kind {checkpoint.kind!r}, which gives text no probability; give '
                        f'--checkpoint_name=... of a language model')
    vocabulary = Vocabulary.from_meta(checkpoint.vocabulary)
    name = config.dataset or checkpoint.config.get('dataset')
    if type(name) is not str:
        raise UserError(f'{path} does not say which corpus it was trained on; name one with --dataset=...')
    corpus = ensure_corpus(name, say, recorded_data_folder(config.data_dir, checkpoint.config))
    if corpus.vocabulary.hash != vocabulary.hash:
        raise UserError(f'{path} has a vocabulary of {vocabulary.base_size} tokens, corpus {name} another one of '
                        f'{corpus.vocabulary.base_size}; take the corpus that it was trained on (--dataset=...)')
    if corpus.data_hash != checkpoint.data_hash:
        say(f'corpus {name} is not the text that {path.name} was trained on (their hashes differ)')
    model = build_model(checkpoint, device).requires_grad_(False)
    sampler_head, _, said = started_heads(model.config, checkpoint.iteration)
    for line in said[:1] if model.config.add_sampler_head and not sampler_head else ():
        say(line)
    runtime = Runtime(device, DTYPES[config.dtype], False)
    allowed = allowed_ids(model.config.vocab_size, vocabulary.base_size, device)
    return Evaluation(config, explicit, checkpoint, checkpoint_hash(path), model, sampler_head, vocabulary, corpus,
                      allowed, runtime, out_dir, say)


def load_pretrained_evaluation(config: EvaluateConfig, explicit: Mapping[str, str], device: torch.device,
                               say: Callable[[str], None]) -> Evaluation:
    """Load a pretrained model and a text file. The measured windows are spread over the text."""
    runtime = Runtime(device, DTYPES[config.dtype], False)
    base = load_with_head(Source.of(config), config.sampler_head, device, runtime.dtype)
    model, vocabulary = base.model, base.vocabulary
    text = read_text(config.text_file, vocabulary, model.config.block_size, config.window_length)
    for line in (*base.said, *text.said):
        say(line)
    if config.windows is not None and config.windows > text.windows:
        raise UserError(f'windows is {config.windows}, but the text has {text.windows}; lower it or give a longer text')
    count = config.windows or min(USUAL_WINDOWS, text.windows)
    model, out_dir = model.at_most(text.length), Path(config.out_dir)
    if 'out_dir' not in explicit:
        out_dir = Path(PRETRAINED_FOLDER)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out_dir, error) from error
    checkpoint = Checkpoint(CheckpointKind.UNMASKING, model_config_to_dict(model.config), {}, {}, vocabulary.hash, '',
                            {}, {}, iteration=1)
    corpus = text_corpus(config.text_file, text.spread(count), vocabulary)
    config = replace(config, windows=count, checkpoint_name=config.model)
    return Evaluation(config, explicit, checkpoint, base.hash_with_head, model, model.sampler_head is not None,
                      vocabulary, corpus, vocabulary.allowed.to(device), runtime, out_dir, say)


def compute_cells(evaluation: Evaluation, cache: ResultCache, name: str, cells: Sequence[Cell]) -> list[Result]:
    """Settings and result of each cell in one dict. Results that the cache lacks are computed and stored there.

    `elapsed` is added to a result: the seconds that it took. A terminal shows a progress bar; elsewhere there is a line
    for each new result. UserError if a result is not a finite number.
    """
    waiting = [cell for cell in cells if cache.find(evaluation.checkpoint_hash, name, cell) is None]
    if len(waiting) < len(cells):
        evaluation.say(f'{name}: {len(cells) - len(waiting)} of {len(cells)} results are known already')
    with ProgressBar(sum(cell.cost for cell in waiting), wanted=bool(waiting), desc=name,
                     bar_format='{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}') as bar:
        for number, cell in enumerate(waiting, 1):
            start = time.perf_counter()
            result = cell.compute()
            broken = [key for key, value in result.items() if isinstance(value, float) and not abs(value) <= FARTHEST]
            if broken:
                raise UserError(f'{name} of {evaluation.config.checkpoint_name} is no number ({", ".join(broken)}): '
                                f'the checkpoint is damaged or its training diverged; take an earlier one')
            elapsed = time.perf_counter() - start
            cache.store(evaluation.checkpoint_hash, name, cell, {**result, 'elapsed': elapsed})
            bar.move(cell.cost)
            if not bar.shown:
                evaluation.say(f'{name}: {number} of {len(waiting)} done, {elapsed:.1f}s')
    return [{**cell.settings, **cache.find(evaluation.checkpoint_hash, name, cell)} for cell in cells]


def table(name: str, columns: Sequence[str], rows: Sequence[Result]) -> list[str]:
    """Lines of a small table: `columns` of `rows` under their names."""
    texts = [[_shown(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts)]
    lines = ['  '.join(text.rjust(width) for text, width in zip(line, widths)) for line in (columns, *texts)]
    return [f'{name}:', *lines]


def _shown(value: object) -> str:
    if value is None:
        return '-'
    return f'{value:.4f}' if isinstance(value, float) else str(value)
