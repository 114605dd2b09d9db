"""The corpus openwebtext: passages, their exact encoding, their splits, and writing them whole in little memory."""

import io
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train as script
from configurator import configure
from core.common.errors import UserError
from core.data import openwebtext, text_files
from core.data.corpus import load_corpus
from core.data.gpt2_bpe import PATTERN, tokens_of
from core.data.openwebtext import Passage, file_passages, prepare_openwebtext, split_of, write_passages
from core.data.prepare import ensure_corpus
from core.data.vocabulary import DOCUMENT_END, Vocabulary
from core.data.writing import Part

ROOT = Path(__file__).resolve().parents[2]
MERGES = '#version: 0.2\nt h\nth e\nĠ the\nĊ Ċ\nĠ Ġ\nĠ Ċ\nĊ Ġ\n. Ĝ\n'


@pytest.fixture(scope='module')
def vocabulary() -> Vocabulary:
    return Vocabulary('bpe', (*tokens_of(MERGES), DOCUMENT_END.encode()), PATTERN)


@pytest.fixture
def prepared(vocabulary: Vocabulary, monkeypatch) -> None:
    """`prepare_openwebtext` with the small vocabulary and small passages."""
    monkeypatch.setattr(openwebtext, 'gpt2_vocabulary', lambda folder, say: vocabulary)
    monkeypatch.setattr(openwebtext, 'PASSAGE', 64)


# --- passages -------------------------------------------------------------------------------------------------------

words = st.sampled_from(['the', 'a', "'s", '.', '<', '1', 'é', '<|endof', DOCUMENT_END])
spaces = st.sampled_from(['', ' ', '\n', '\t', '  ', '\n ', '\u3000', '\x1c'])
cuttable = st.sampled_from([' ', '\n', '\n\n', ' \n', '  ', '\n\n '])


@given(st.lists(st.tuples(words, spaces, words, cuttable), max_size=60))
@settings(deadline=None, max_examples=200)
def test_passages_are_encoded_as_the_whole_document(tmp_path_factory, vocabulary, elements: list) -> None:
    """Whatever the size of passages and of the blocks that are read, and where documents end.

    Each element has a place to cut after it and fits into a passage, so that nothing is cut by force.
    """
    text = ''.join(map(''.join, elements))
    path = tmp_path_factory.getbasetemp() / 'passages.txt'
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openwebtext, 'PASSAGE', 48)
        patch.setattr(text_files, 'READ', 7)
        passages = list(file_passages([path]))
    documents = [document for document in text.split(DOCUMENT_END) if document.strip()]
    assert ''.join(text + DOCUMENT_END * ends for text, ends in passages) == \
        ''.join(document + DOCUMENT_END for document in documents)
    assert all(0 < len(passage.text) <= 48 for passage in passages)
    expected = [vocabulary.encode(document) for document in documents]
    found: list[list[int]] = [[]]
    for passage in passages:
        found[-1] += vocabulary.encode(passage.text)
        found += [[]] * passage.ends_document
    assert found[:-1] == expected and found[-1] == []


def test_passages_are_cut_where_merging_stops(tmp_path: Path, prepared, vocabulary: Vocabulary) -> None:
    """With the border of a passage at each place of white space and of signs that only Python takes for it."""
    path = tmp_path / 'my.txt'
    for offset in range(50):
        text = 'x' * offset + '\n\n the  \n\nthe.\x1c. .\x1c\x1c.\n' * 8
        path.write_text(text)
        passages = list(file_passages([path]))
        assert len(passages) > 2
        assert [token for passage in passages for token in vocabulary.encode(passage.text)] == vocabulary.encode(text)


def test_a_word_longer_than_a_passage_is_cut_and_nothing_is_lost(tmp_path: Path, prepared) -> None:
    path = tmp_path / 'my.txt'
    for text in ('x' * 1000, 'x' * 128 + '\n' * 128, ' ' + 'y' * 200 + ' z', 'x' * 64 + DOCUMENT_END + 'y'):
        path.write_text(text)
        passages = list(file_passages([path]))
        assert ''.join(passage.text for passage in passages) == text.replace(DOCUMENT_END, '')
        assert max(len(passage.text) for passage in passages) <= 64 and passages[-1].ends_document


def test_a_blank_document_behind_a_long_one_leaves_no_end(tmp_path: Path, prepared, monkeypatch) -> None:
    monkeypatch.setattr(text_files, 'READ', 7)
    path = tmp_path / 'my.txt'
    path.write_text('the ' * 100 + f'{DOCUMENT_END}\n{DOCUMENT_END}a')
    passages = list(file_passages([path]))
    assert [passage.text for passage in passages if passage.ends_document] == [passages[-2].text, 'a']


def test_files_of_any_system_and_what_is_no_text(tmp_path: Path) -> None:
    one, two = tmp_path / 'one.txt', tmp_path / 'two é.txt'
    one.write_bytes('\ufeffa\r\nb\rc'.encode())
    two.write_bytes(f'd{DOCUMENT_END}\n{DOCUMENT_END}e'.encode())
    assert list(file_passages([one, two])) == [Passage('a\nb\nc', True), Passage('d', True), Passage('e', True)]
    for content, problem in ((b'ab\xff', r'is not UTF-8 \(byte 255'), (b'a\0b', 'zero byte')):
        one.write_bytes(content)
        with pytest.raises(UserError, match=problem):
            list(file_passages([one]))
    with pytest.raises(UserError, match='cannot be read'):
        list(file_passages([tmp_path / 'none']))


def hub(monkeypatch, rows) -> dict:
    """A stand-in for the package datasets; returns what it is asked for."""
    asked: dict = {}

    def load_dataset(name: str, **options):
        asked.update(options, name=name)
        return rows

    module = ModuleType('datasets')
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, 'datasets', module)
    return asked


def test_documents_of_the_hub_are_streamed(monkeypatch) -> None:
    asked = hub(monkeypatch, iter([{'text': 'one'}, {'text': ' \n'}, {'text': 'x' * 50_000}]))
    assert list(openwebtext.dataset_passages()) == [Passage('one', True), Passage('x' * 50_000, True)]
    assert asked == {'name': 'Skylion007/openwebtext', 'revision': 'refs/convert/parquet', 'split': 'train',
                     'streaming': True}


def test_a_missing_package_and_a_lost_connection_name_the_cure(monkeypatch) -> None:
    def rows():
        yield {'text': 'one'}
        raise ConnectionError('gone\nfor now')

    hub(monkeypatch, rows())
    with pytest.raises(UserError, match=r'ConnectionError: gone for now.*--input FILE') as error:
        list(openwebtext.dataset_passages())
    assert '\n' not in str(error.value)
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match=r'datasets, which is not installed: run "pip install datasets".*--input FILE'):
        list(openwebtext.dataset_passages())


# --- splits and writing ---------------------------------------------------------------------------------------------

def test_of_every_hundred_passages_95_are_train_4_ref_and_1_val() -> None:
    for first in (0, 700):
        splits = [split_of(number) for number in range(first, first + 100)]
        assert [splits.count(split) for split in ('train', 'ref', 'val')] == [95, 4, 1]
    assert [number for number in range(200) if split_of(number) == 'val'] == [50, 150]
    assert [number for number in range(60) if split_of(number) == 'ref'] == [12, 37]


def test_written_splits_hold_their_passages_in_order(tmp_path: Path, vocabulary: Vocabulary) -> None:
    passages = [Passage(f'the é {number}\n\n', number % 3 > 0) for number in range(1000)]
    write_passages(tmp_path / 'c', vocabulary, iter(passages), 'a test')
    corpus = load_corpus('c', tmp_path)
    for split in ('train', 'ref', 'val'):
        own = [passage for number, passage in enumerate(passages) if split_of(number) == split]
        ids = [token for text, ends in own
               for token in vocabulary.encode(text) + [vocabulary.document_end_id] * ends]
        assert corpus.tokens(split).tolist() == ids
        assert corpus.characters[split] == sum(len(passage.text) for passage in own)
        assert corpus.utf8_bytes[split] == sum(len(passage.text.encode()) for passage in own)
    assert sorted(path.name for path in corpus.folder.iterdir()) == ['meta.pkl', 'prepare.lock', 'ref.bin',
                                                                     'train.bin', 'val.bin']


def test_no_more_than_a_few_passages_are_in_memory(monkeypatch) -> None:
    encoded = []

    def passages():
        for number in range(50):
            assert number - len(encoded) < 8
            yield Passage('x' * number, False)

    def encode(text: str) -> np.ndarray:
        encoded.append(text)
        return np.zeros(len(text), dtype=np.int64)

    monkeypatch.setattr(openwebtext, 'TOGETHER', 8)
    stand_in = SimpleNamespace(encode_array=encode, document_end_id=7, dtype='uint16')
    parts = {split: Part(SimpleNamespace(file=io.BytesIO())) for split in ('train', 'ref', 'val')}
    openwebtext._encode_into(parts, stand_in, passages())
    written = len(parts['train'].written.file.getvalue()) // 2
    assert len(encoded) == 50 and parts['train'].tokens == written == 1225 - 12 - 37


@pytest.mark.parametrize('failure', [KeyboardInterrupt, UserError, OSError])
def test_what_breaks_off_leaves_the_old_corpus(tmp_path: Path, vocabulary: Vocabulary, failure) -> None:
    def breaking_off():
        yield from [Passage('other', True)] * 400
        raise failure('broken')

    write_passages(tmp_path / 'c', vocabulary, [Passage('the', True)] * 200, 'a test')
    before = load_corpus('c', tmp_path)
    with pytest.raises(UserError if failure is OSError else failure):
        write_passages(tmp_path / 'c', vocabulary, breaking_off(), 'a test', overwrite=True)
    assert load_corpus('c', tmp_path) == before and not list(before.folder.glob('*.tmp'))


def test_too_little_text_is_refused(tmp_path: Path, vocabulary: Vocabulary) -> None:
    with pytest.raises(UserError, match=r'of a test is too short: nothing is left for val; .*data/custom/prepare.py'):
        write_passages(tmp_path / 'c', vocabulary, [Passage('the', True)] * 50, 'a test')
    assert not (tmp_path / 'c').exists()


# --- the command ----------------------------------------------------------------------------------------------------

def test_text_files_become_the_corpus(data_here: Path, prepared, monkeypatch, capsys) -> None:
    monkeypatch.setattr(openwebtext, 'REPORT_SECONDS', 0)
    text = 'To be the or not to be the.\n\n' * 300
    for name in ('one.txt', 'two.txt'):
        Path(name).write_text(text)
    prepare_openwebtext(['--input', 'one.txt', 'two.txt'], 'usage')
    corpus = ensure_corpus('openwebtext')
    assert corpus.folder == data_here / 'openwebtext'
    assert corpus.source == 'one.txt and 1 more' and sum(corpus.characters.values()) == 2 * len(text)
    tokens = np.concatenate([corpus.tokens(split) for split in corpus.sizes])
    assert (tokens == corpus.vocabulary.document_end_id).sum() == 2
    out = capsys.readouterr().out
    assert 'GB encoded, about 0 min left' in out and f'train {corpus.sizes["train"]:,}, ref' in out
    with pytest.raises(UserError, match='already: add --overwrite'):
        prepare_openwebtext(['--input', 'one.txt'], 'usage')
    assert ensure_corpus('openwebtext') == corpus
    prepare_openwebtext(['--overwrite', '--input', 'one.txt'], 'usage')
    assert ensure_corpus('openwebtext').source == 'one.txt'


def test_wrong_arguments_are_listed(data_here: Path, prepared) -> None:
    Path('there').write_text('x')
    for arguments, problem in (
            (['there'], 'needs --input before it'), (['--input', 'missing'], "'missing' is not there"),
            (['--input', 'there', '--input', 'there'], 'more than once'),
            (['--inputs', 'there'], 'did you mean --input'),
            (['--encoding=cp1252'], 'applies to --input only'), (['--input='], 'needs a value'),
            (['--input', 'there', '--encoding=none'], 'encoding=none is unknown')):
        with pytest.raises(UserError, match=problem):
            prepare_openwebtext(arguments, 'usage')
    assert not list(data_here.iterdir())


def test_training_names_the_command_instead_of_fetching(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'is not prepared yet in .*: run python \S*data/openwebtext/prepare.py '):
        ensure_corpus('openwebtext', print, tmp_path)
    with pytest.raises(UserError, match=r"did you mean 'openwebtext'"):
        ensure_corpus('openwebtex', print, tmp_path)
    assert not os.listdir(tmp_path)


def test_config_has_gpt2s_shape_and_shrinks_on_a_cpu() -> None:
    sizes = {}
    for device in ('cpu', 'cuda'):
        configuration = configure(script.TrainConfig, [str(ROOT / 'config' / 'train_gpt2_diffusion.py')],
                                  resolve_device=lambda asked: device)
        sizes[device] = configuration.config
    config = sizes['cuda']
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (12, 12, 768, 1024)
    assert (config.dataset, config.sampler_output) == ('openwebtext', 'shared_detached')
    assert config.gradient_accumulation_steps * config.batch_size * config.block_size == 491_520
    for config in sizes.values():
        assert config.warmup_iters < config.start_sampler_iteration < config.lr_decay_iters == config.max_iters
    assert sizes['cpu'].n_embd * sizes['cpu'].n_layer <= 512
