"""The page of sample.py --serve=True over HTTP: who may ask, what is refused, and that a text is the command line's."""

import http.client
import io
import json
import re
import socket
import threading
import time

import pytest
import torch
from PIL import Image

from core.common.errors import UserError
from core.sampling import serving
from core.sampling.serving import service as service_module
from core.sampling.serving.queue import LONGEST, Queue, QueueFull
from core.sampling.serving.requests import LONGEST_TEXT, MOST_STEPS, UNUSED, serving_problems
from core.sampling.serving.server import LARGEST_BODY, Server
from core.sampling.serving.service import KEPT
from helpers.sampling import VOCABULARY, sample, write_checkpoint
from helpers.serving import served, settings
from helpers.toys import model_over, model_that_knows, save_model

TYPE = {'Content-Type': 'application/json'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('serving')
    save_model(folder / 'ckpt_best.pt', VOCABULARY, model_over(VOCABULARY, add_critic_head=True))
    write_checkpoint(folder / 'causal.pt', kind='causal', attention_type='causal')
    return folder


@pytest.fixture(scope='module')
def server(folder):
    with served(folder) as server:
        yield server


def ask(server, method='POST', path='/run', body=b'', **headers):
    """Status, headers and body of an answer; a header of None is left out."""
    connection = http.client.HTTPConnection('127.0.0.1', server.server_port, timeout=60)
    given = {'Host': f'127.0.0.1:{server.server_port}', **({} if method == 'GET' else {
        'Origin': f'http://127.0.0.1:{server.server_port}', **TYPE, 'Content-Length': str(len(body))}),
        **{name.replace('_', '-'): value for name, value in headers.items()}}
    connection.putrequest(method, path, skip_host=True)
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, answer.headers, text


def write(server, **asked):
    """The lines of a run that is to go well."""
    status, _, text = ask(server, body=json.dumps(asked).encode())
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def problems(server, status, body, **headers):
    got, _, text = ask(server, body=body, **headers)
    assert got == status, text
    return json.loads(text)['problems']


# Texts --------------------------------------------------------------------------------------------------------------

RUNS = {
    'plain': ({}, ()),
    'prompt': ({'start_text': 'bad cab', 'sequence_length': 30, 'seed': 5},
               ('--start_text=bad cab', '--sequence_length=30', '--seed=5')),
    'line break': ({'start_text': 'a\nb', 'iterations': 6},
                                       ('--start_text=a\\nb', '--iterations=6')),
    'gaps': ({'infill_text': 'head__bad_', 'infill_char': '_', 'temperature': 1, 'iterations': 4},
             ('--infill_text=head__bad_', '--temperature=1.0', '--iterations=4')),
    'policy': ({'sampling_policy': 'maskgit', 'iterations': 5, 'block_length': 8},
               ('--sampling_policy=maskgit', '--iterations=5', '--block_length=8')),
    'preset': ({'preset': 'careful', 'iterations': 7, 'sampling_policy': 'remask'},
               ('--preset=careful', '--iterations=7', '--sampling_policy=remask')),
    'with doubt': ({'doubt': True, 'iterations': 4}, ('--iterations=4',))}


@pytest.mark.parametrize('run', RUNS)
def test_a_text_is_the_command_lines(server, folder, run):
    asked, arguments = RUNS[run]
    result, _ = sample(folder, '--num_samples=1', *arguments)
    lines = write(server, **asked)
    assert lines[-1]['event'] == 'done' and lines[-1]['text'] == result.texts[0]
    assert lines[-1]['tokens'] == result.tokens[0].tolist() and lines[-1]['trunk_calls'] == result.trunk_calls


def test_the_steps_lead_to_the_text(server):
    first, *frames, last = write(server, start_text='cab', sequence_length=14, iterations=5)
    tokens, pieces = [None] * first['length'], dict(first['pieces'])
    for position, token in zip(first['protected'], first['prompt']):
        tokens[position] = token
    for line in frames:
        frame = line['frame']
        for index, position in enumerate(frame['positions']):
            tokens[position] = frame['tokens'][index] if frame['event'] == 'predict' else None
            assert position not in first['protected']
        pieces.update(line['pieces'])
    assert tokens == last['tokens'] and len(frames) == 9  # 5 predictions, 4 remaskings
    assert first['protected'] == [0, 1, 2] and first['length'] == 14
    assert ''.join(pieces[str(token)] for token in tokens) == last['text']


def test_options_of_the_command_are_defaults_of_the_page(folder):
    save_model(folder / 'remasking.pt', VOCABULARY, model_that_knows(VOCABULARY, 'aceg', block_size=16,
                                                                     mode='token_classifier'), 'classifier')
    given = ('--sequence_length=12', '--temperature=0.5')
    more = ('--iterations=3', '--start_ratio=0.5', '--remasking_checkpoint_name=remasking.pt')
    with served(folder, *given, *more) as server:
        result, _ = sample(folder, '--num_samples=1', *given, '--sampling_policy=first_hitting')
        lines = write(server, sampling_policy='first_hitting', doubt=True)
        assert lines[-1]['text'] == result.texts[0]
        wrong = [token in VOCABULARY.encode('aceg') for token in lines[-1]['tokens']]
        assert [doubt > 0.5 for doubt in lines[-2]['doubt']] == wrong and 0 < sum(wrong) < 12
        result, _ = sample(folder, '--num_samples=1', *given, *more)
        assert write(server)[-1]['text'] == result.texts[0]
        assert len(write(server, infill_text='a_b')[-1]['tokens']) == 3


def test_a_causal_checkpoint_writes_left_to_right(folder):
    with served(folder, '--checkpoint_name=causal.pt') as server:
        result, _ = sample(folder, '--checkpoint_name=causal.pt', '--sampling_method=standard', '--num_samples=1',
                           '--start_text=bad')
        assert write(server, start_text='bad')[-1]['text'] == result.texts[0]
        assert 'a causal model cannot redraw' in problems(server, 400, b'{"tokens": [1, 2], "take_back": [0]}')[0]
        offers = json.loads(ask(server, 'GET', '/offers')[2])
        assert offers['policies'] == {} and not offers['gaps'] and not offers['critic']
        assert offers['notes'] == ['This model writes from left to right and sees nothing after a gap: it fills no gaps '
                                   'and redraws nothing.']


def test_a_redraw_is_an_infilling(server, folder):
    written = write(server, sequence_length=16, iterations=4)[-1]
    marks = [2, 3, 9]
    redrawn = write(server, tokens=written['tokens'], take_back=marks, seed=7, iterations=4)
    start, done = redrawn[0], redrawn[-1]
    assert start['protected'] == [place for place in range(16) if place not in marks]
    assert [token for place, token in enumerate(done['tokens']) if place not in marks] == start['prompt']
    text = ''.join('_' if place in marks else VOCABULARY.decode([token])
                   for place, token in enumerate(written['tokens']))
    result, _ = sample(folder, '--num_samples=1', '--infill_text=' + text.replace('\n', '\\n'), '--seed=7',
                       '--iterations=4')
    assert done['text'] == result.texts[0]


def test_doubt_is_the_critics(server):
    lines = write(server, iterations=3, doubt=True, seed=3)
    model = server.service._opened.build()
    told = [line['doubt'] for line in lines[1:-1] if line['frame']['event'] == 'predict']
    with torch.no_grad():
        scores = model.critic_scores(torch.tensor([lines[-1]['tokens']]))[0].tolist()
    assert told[-1] == pytest.approx(scores, abs=6e-4) and len(told) == 3 and len(set(told[-1])) > 3
    assert all(line['doubt'] is None for line in write(server, iterations=3)[1:-1])


def test_block_borders(server):
    assert write(server, sequence_length=28, iterations=2)[0]['blocks'] == [16, 24]  # windows of 16 that carry 8
    assert write(server, sequence_length=16, iterations=2, block_length=6)[0]['blocks'] == [6, 12]


def test_a_block_model_offers_the_steps_of_its_blocks(tmp_path):
    """And with them writes what the command line writes by default."""
    write_checkpoint(tmp_path / 'ckpt_best.pt', attention_type='block', block_length=(4,), add_sampler_head=True,
                     sampler_order='left_to_right')
    result, _ = sample(tmp_path, '--num_samples=1')
    with served(tmp_path) as server:
        offers = json.loads(ask(server, 'GET', '/offers')[2])
        assert offers['presets'] == {} and offers['policies'] and not offers['gaps'] and not offers['critic']
        assert [note.split(' and ')[0] for note in offers['notes'][:1]] == ['This model writes in blocks of 4 tokens']
        assert 'presets' in offers['notes'][1].lower() and 'doubt' in offers['notes'][2].lower()
        assert 'sees nothing after' in problems(server, 400, b'{"infill_text": "a_b"}')[0]
        written = write(server)[-1]['tokens']
        assert write(server, tokens=written, take_back=[1, 2])[-1]['tokens'][4:] == written[4:]
        steps = offers['values']['iterations']
        assert steps == 1 and write(server, iterations=steps)[-1]['text'] == result.texts[0]


def test_a_finished_run_can_be_kept(server, folder, tmp_path):
    done = write(server, iterations=3, seed=11)[-1]
    status, headers, body = ask(server, 'GET', f'/runs/{done["run"]}/run.json')
    kept = json.loads(body)
    assert status == 200 and kept['texts'] == [done['text']] and kept['settings']['seed'] == 11
    assert kept['steps'][-1]['samples'][0]['tokens'] == done['tokens']
    sample(folder, '--iterations=3', '--seed=11', '--num_samples=1', '--quality_metric=none',
           f'--save_json={tmp_path}/run.json')  # the same record, but for what differs between two runs
    saved = json.loads((tmp_path / 'run.json').read_text())
    assert kept.keys() == saved.keys() and all(kept[name] == saved[name] for name in saved if name not in (
        'settings', 'seconds'))
    assert headers['Content-Disposition'] == 'attachment; filename="run.json"'
    status, headers, body = ask(server, 'GET', f'/runs/{done["run"]}/run.gif')
    assert status == 200 and headers['Content-Type'] == 'image/gif' and Image.open(io.BytesIO(body)).n_frames > 3
    assert b'Sampling replay' in ask(server, 'GET', f'/runs/{done["run"]}/run.html')[2]
    for path in (f'/runs/{done["run"]}/other', '/runs/none/run.json', '/runs/../run.json', '/page.html', '/run'):
        assert ask(server, 'GET', path)[0] == 404
    for _ in range(KEPT):
        write(server, iterations=1, sequence_length=2)
    assert ask(server, 'GET', f'/runs/{done["run"]}/run.json')[0] == 404


# Refusals -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('headers', [
    {'Host': 'evil.example'}, {'Host': None}, {'Host': 'localhost'}, {'Host': '127.0.0.1:1'}, {'Host': '127.0.0.2'},
    {'Origin': 'http://evil.example'}, {'Origin': 'null'}, {'Origin': None}, {'Origin': 'https://127.0.0.1'},
    {'Origin': ''}, {'Sec_Fetch_Site': 'cross-site'}, {'Sec_Fetch_Site': 'same-site'}])
def test_another_host_or_origin_is_refused(server, monkeypatch, headers):
    def prepare(*_):
        raise AssertionError('a stranger was answered')

    monkeypatch.setattr(server.service, 'prepare', prepare)
    assert ask(server, body=b'{}', **headers)[0] == 403
    if headers != {'Origin': None}:
        assert ask(server, 'GET', '/', **headers)[0] == 403
        assert ask(server, 'GET', '/offers', **headers)[0] == 403


def test_the_own_page_is_answered(server):
    for name in ('127.0.0.1', 'localhost'):
        at = f'{name}:{server.server_port}'
        assert ask(server, 'GET', '/', Host=at)[0] == 200
        assert ask(server, body=b'{"iterations": 1, "sequence_length": 2}', Host=at, Origin=f'http://{at}')[0] == 200
    assert server.server_address[0] == '127.0.0.1'


@pytest.mark.parametrize('headers, body, status', [
    ({}, b'x' * (LARGEST_BODY + 1), 413), ({'Content_Length': '9' * 5000}, b'', 413),
    ({'Content_Length': None}, b'', 411), ({'Content_Length': '-1'}, b'', 411),
    ({'Content_Length': '²'.encode()}, b'', 411),
    ({'Content_Type': 'text/plain'}, b'{}', 415), ({'Content_Type': None}, b'{}', 415)])
def test_bodies_that_are_refused(server, headers, body, status):
    got, sent, text = ask(server, body=body if status != 413 else b'', **(headers or {
        'Content_Length': str(len(body))}))
    assert got == status and json.loads(text)['problems'] and sent['Content-Type'] == 'application/json'


@pytest.mark.parametrize('body', [b'', b'{', b'\xff', b'{"temperature": NaN}', b'[' * 60000, b'{"seed": Infinity}'])
def test_what_is_not_json(server, body):
    assert problems(server, 400, body) == ['the request is not JSON; reload the page']
    assert problems(server, 400, b'[1]') == ['the request is not a JSON object; reload the page']


@pytest.mark.parametrize('asked, words', [
    ({'save_json': '/tmp/x'}, 'no option of the page'), ({'checkpoint_name': 'x'}, 'no option of the page'),
    ({'num_samples': 9}, 'no option of the page'), ({'iterations': True}, 'must be a whole number'),
    ({'iterations': 2.0}, 'must be a whole number'), ({'seed': '1'}, 'must be a whole number'),
    ({'start_text': 3}, 'must be a text'), ({'temperature': 1e300}, 'must be a number'),
    ({'temperature': -1}, 'must not be negative'), ({'iterations': 0}, 'at least 1'),
    ({'iterations': MOST_STEPS + 1}, 'the page takes at most 1,000'), ({'seed': 2**70}, 'at most'),
    ({'sequence_length': LONGEST_TEXT + 1}, 'the page takes at most 2,048'),
    ({'start_text': 'a' * 17, 'sequence_length': 16}, 'raise sequence_length'),
    ({'infill_text': 'a' * (LONGEST_TEXT + 1)}, 'the page takes at most 2,048'),
    ({'sampling_policy': 'none'}, 'must be one of'), ({'preset': 'none'}, 'must be one of fast'),
    ({'start_text': 'xyz'}, 'x'),
    ({'sampling_policy': 'first_hitting', 'iterations': 4}, 'does not apply'),
    ({'infill_char': 'ab', 'infill_text': 'a'}, 'one character'),
    ({'tokens': [1, 2]}, 'go together'), ({'take_back': [1]}, 'go together'),
    ({'tokens': [1, 2], 'take_back': [2]}, 'outside the text'), ({'tokens': [1, 2], 'take_back': [-1]}, 'outside'),
    ({'tokens': [1, VOCABULARY.mask_token_id], 'take_back': [0]}, 'no token of a text'),
    ({'tokens': [1, 10**12], 'take_back': [0]}, 'no token of a text'),
    ({'tokens': [1, 2.5], 'take_back': [0]}, 'a list of whole numbers'),
    ({'tokens': [1, 2], 'take_back': [0], 'start_text': 'a'}, 'does not apply to a redraw')])
def test_options_that_are_refused(server, asked, words):
    found = problems(server, 400, json.dumps(asked).encode())
    assert any(words in problem for problem in found), found


def test_several_problems_come_together(server):
    found = problems(server, 400, b'{"iterations": "a", "seed": [], "unknown": 1}')
    assert [problem.split()[0] for problem in found] == ['iterations', 'seed', "'unknown'"]
    found = problems(server, 400, b'{"temperature": -1, "iterations": 0}')
    assert len(found) == 2


def test_no_file_is_read_for_a_text(server, tmp_path):
    (tmp_path / 'secret').write_text('abc')
    found = problems(server, 400, json.dumps({'start_text': f'@{tmp_path}/secret'}).encode())
    assert not any('abc' in problem for problem in found)


def test_a_network_without_numbers_is_told_after_the_start(folder):
    with served(folder) as server:
        server.service._opened.build().transformer.wte.weight.fill_(torch.nan)
        lines = write(server, iterations=2)
    assert lines[-1]['event'] == 'problem' and 'not numbers' in lines[-1]['problems'][0]


# One at a time --------------------------------------------------------------------------------------------------------

def begun(server, **asked):
    """A connection whose run was asked for."""
    body = json.dumps(asked).encode()
    connection = socket.create_connection(('127.0.0.1', server.server_port), timeout=60)
    at = f'127.0.0.1:{server.server_port}'
    connection.sendall((f'POST /run HTTP/1.1\r\nHost: {at}\r\nOrigin: http://{at}\r\nContent-Type: application/json\r\n'
                        f'Content-Length: {len(body)}\r\n\r\n').encode() + body)
    return connection


def until(condition, seconds=30):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def read_until(connection, words):
    seen = b''
    while words not in seen:
        more = connection.recv(1 << 16)
        assert more, seen
        seen += more
    return seen


def test_runs_wait_for_each_other(server):
    queue = server.service.queue
    with queue.place():
        first = begun(server, iterations=1, sequence_length=2)
        assert b'"start"' not in read_until(first, b'{"event":"waiting","before":1}')
        second = begun(server, iterations=1, sequence_length=2)
        read_until(second, b'{"event":"waiting","before":2}')
        first.close()  # who waits no more makes room
        read_until(second, b'{"event":"waiting","before":1}')
        assert len(queue._tickets) == 2
    read_until(second, b'"done"')
    second.close()
    until(lambda: not queue._tickets)


def test_a_full_queue(server):
    queue, held = server.service.queue, []
    for _ in range(LONGEST + 1):
        held.append(queue.place())
        held[-1].__enter__()
    try:
        assert problems(server, 503, b'{}') == [f'{LONGEST} runs wait already, the most there may be; try again later']
        with pytest.raises(QueueFull), queue.place():
            pass
    finally:
        for place in held:
            place.__exit__(None, None, None)
    assert write(server, iterations=1, sequence_length=2)[-1]['event'] == 'done'


def test_never_two_at_once():
    queue, running, most = Queue(longest=8, seconds=0.01), [], []

    def run():
        with queue.place() as ticket:
            queue.wait(ticket, lambda before: None)
            running.append(1)
            most.append(len(running))
            time.sleep(0.01)
            running.pop()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_a_run_ends_when_nobody_listens(server, monkeypatch):
    plain, ended = service_module.generate, []

    def generate(network, *arguments):
        try:
            return plain(network, *arguments)
        finally:
            ended.append(network.trunk_calls)

    monkeypatch.setattr(service_module, 'generate', generate)
    connection = begun(server, iterations=MOST_STEPS, sequence_length=16, seed=2)
    read_until(connection, b'"frame"')
    connection.close()
    until(lambda: ended)
    assert ended[0] < MOST_STEPS
    until(lambda: not server.service.queue._tickets)
    assert write(server, iterations=1, sequence_length=2)[-1]['event'] == 'done'


# The command and the page ---------------------------------------------------------------------------------------------

def test_options_that_the_page_has_no_use_for(folder):
    config, explicit = settings(folder, '--serve=True', '--save_json=x', '--num_samples=3')
    with pytest.raises(UserError) as error:
        serving.serve(config, explicit)
    assert str(error.value).split('\n') == [
        'save_json does not apply to serve=True; leave it out',
        'num_samples does not apply to serve=True; leave it out']
    assert len(serving_problems(dict.fromkeys(UNUSED, ''))) == len(UNUSED)
    with pytest.raises(UserError, match='port was given, but applies only with serve=True'):
        sample(folder, '--port=9000')


def test_a_port_that_is_taken(folder, server):
    with pytest.raises(UserError, match=f'port is {server.server_port}, but it cannot be opened .*in use'):
        serving.serve(*settings(folder, '--serve=True', f'--port={server.server_port}'), say=lambda line: None)


def test_serving_says_where(folder, monkeypatch):
    monkeypatch.setattr(Server, 'serve_forever', lambda self: None)
    said = []
    serving.serve(*settings(folder, '--serve=True', '--port=0'), say=said.append)
    assert re.fullmatch(r'open http://127\.0\.0\.1:\d+/ in a browser; Ctrl-C ends it', said[-1])


def test_ctrl_c_ends_a_run_first(folder, monkeypatch):
    """One at work for minutes and one that waits; afterwards nobody computes and nobody is let in."""
    queues, threads = [], set(threading.enumerate())

    def serve_forever(server):
        queue = server.service.queue
        queues.append(queue)
        body = json.dumps({'sequence_length': 2048, 'iterations': 1000}).encode()
        for number in range(2):
            client = threading.Thread(target=ask, args=(server,), kwargs={'body': body})
            client.start()
            server.handle_request()
            while len(queue._tickets) < number + 1:
                time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, 'serve_forever', serve_forever)
    with pytest.raises(KeyboardInterrupt):
        serving.serve(*settings(folder, '--serve=True', '--port=0'), lambda line: None)
    assert queues[0]._tickets == []
    with pytest.raises(QueueFull, match='ends'), queues[0].place():
        pass
    assert [one.name for one in set(threading.enumerate()) - threads if 'process_request' in one.name] == []


def test_the_page_takes_nothing_as_markup(server):
    for path in ('/', '/text.js', '/serve.js', '/style.css', '/serve.css'):
        status, headers, body = ask(server, 'GET', path)
        text, policy = body.decode(), headers['Content-Security-Policy']
        assert status == 200 and "default-src 'none'" in policy and "script-src 'self'" in policy
        assert 'unsafe' not in policy and headers['X-Content-Type-Options'] == 'nosniff'
        assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|https?://',
                             text)
        if path == '/':
            assert not re.search(r'<script(?! src="/)|<style|\son\w+=|\sstyle=', text)
    assert ask(server, 'PUT', '/')[0] == 501
