"""What reaches a terminal, on whichever terminal, and what a process without one does."""

import io
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from core.common.printing import OutputLost, attach_streams, complain, encodable, escaped, optional, say, say_if_heard

ROOT = Path(__file__).parent.parent.parent


def terminal(monkeypatch, encoding='utf-8', name='stdout'):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding))
    return raw


# ---------------------------------------------------------------- escaping

@pytest.mark.parametrize('text, shown', [
    ('\x1b[2J', r'\x1b[2J'), ('a\x07', r'a\x07'), ('\x9b31m', r'\x9b31m'), ('\r', r'\x0d'), ('a\x08b', r'a\x08b'),
    ('\x7f', r'\x7f'), ('\x85', r'\x85'), ('\u202ecod', r'\u202ecod'), ('\u2066a\u2069', r'\u2066a\u2069'),
    ('\u200f', r'\u200f'), ('\u2028', r'\u2028'), ('\udce9', r'\udce9'), ('\U000e0041', r'\U000e0041'),
    ('\ufeff', r'\ufeff'), ('a\tb\nc', 'a\tb\nc'), ('é ü \xa0 \u200d 漢 😀', 'é ü \xa0 \u200d 漢 😀')])
def test_control_characters_are_shown(text, shown):
    assert escaped(text) == shown


@given(st.text())
def test_nothing_that_is_left_controls_the_terminal(text):
    left = escaped(text)
    assert all(unicodedata.category(one) not in ('Cc', 'Cs', 'Zl', 'Zp')
               for one in left.replace('\n', '').replace('\t', ''))
    assert not any(unicodedata.bidirectional(one) in ('LRE', 'RLE', 'LRO', 'RLO', 'PDF', 'LRI', 'RLI', 'FSI', 'PDI')
                   for one in left)
    assert len(escaped(text, '?')) == len(text) and escaped(left) == left


@given(st.text(), st.sampled_from(['ascii', 'cp1252', 'latin-1', 'shift_jis', 'utf-8', None]))
def test_every_encoding_takes_what_is_shown(text, encoding):
    shown = encodable(escaped(text), encoding)
    assert shown.encode(encoding or 'utf-8').decode(encoding or 'utf-8') == shown


@pytest.mark.parametrize('encoding, shown', [('ascii', rb'\xe9 \u6f22 \x1b[m'), ('cp1252', b'\xe9 \\u6f22 \\x1b[m'),
                                             ('utf-8', 'é 漢 \\x1b[m'.encode())])
def test_a_terminal_that_lacks_the_letters_gets_them_escaped(monkeypatch, encoding, shown):
    out, err = terminal(monkeypatch, encoding), terminal(monkeypatch, encoding, 'stderr')
    say('é 漢 \x1b[m')
    say_if_heard('é 漢 \x1b[m')
    complain('é 漢 \x1b[m')
    assert out.getvalue() == (shown + b'\n') * 2 and err.getvalue() == shown + b'\n'


# ---------------------------------------------------------------- streams that are lost

class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize('error', [BrokenPipeError(), OSError(28, 'No space left on device'), OSError(5, 'I/O error')])
def test_work_without_a_reader_goes_on(monkeypatch, error):
    monkeypatch.setattr(sys, 'stdout', Broken(error))
    monkeypatch.setattr(sys, 'stderr', Broken(error))
    say_if_heard('one')
    complain('two')
    with pytest.raises(BrokenPipeError if isinstance(error, BrokenPipeError) else OutputLost):
        say('three')
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, 'stdout', closed)
    say_if_heard('four')


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no full device')
def test_a_full_disk_in_place_of_a_terminal_is_a_sentence():
    code = ('from core.common.errors import run_script\nfrom core.common.printing import say\n'
            'run_script(lambda a: say("x"))')
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: standard output cannot be written (No space left')
    assert done.stderr.count('\n') == 1


CLOSED = """
import sys
from core.common.errors import run_script
from core.common.printing import complain, say

def main(arguments):
    with open('opened.txt', 'w') as file:
        say('said')
        complain('complained')
        print('printed', file=sys.stderr, flush=True)
        sys.stdin.read()
        file.write('kept')

run_script(main)
"""


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&-', '>&- 2>&-', '<&- >&- 2>&-'])
def test_closed_streams_lead_nowhere_and_not_into_files(tmp_path, closed):
    done = subprocess.run(['bash', '-c', f'exec "$0" -c "$1" {closed}', sys.executable, CLOSED], cwd=tmp_path,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and (tmp_path / 'opened.txt').read_text() == 'kept'
    assert done.stdout == ('' if ' >&-' in f' {closed}' else 'said\n')
    assert done.stderr == ('' if '2>&-' in closed else 'complained\nprinted\n')


def test_streams_that_are_there_are_left(monkeypatch):
    before = sys.stdout, sys.stderr
    attach_streams()
    assert (sys.stdout, sys.stderr) == before


# ---------------------------------------------------------------- what no work needs

def test_what_is_optional_fails_in_one_line_the_first_time(failing_decoration):
    def fails():
        raise SystemExit('out\n of \x1b paper')

    said = []
    assert optional('there is no picture', lambda: 3, said.append) == 3 and said == []
    assert [optional('there is no picture', fails, said.append) for _ in range(3)] == [None] * 3
    assert said == ['there is no picture: SystemExit: out of \x1b paper; all else goes on']
    with pytest.raises(KeyboardInterrupt):
        optional('there is no picture', lambda: (_ for _ in ()).throw(KeyboardInterrupt))
