"""The replay page: its data are the trace, no text becomes markup, and a browser shows each step as it was."""

import html
import json
import math
import re
import shutil
import subprocess

import pytest
import torch

from core.common.drawing import DrawRule, allowed_ids
from core.common.errors import UserError
from core.common.randomness import keyed
from core.common.timing import TimingAccumulator
from core.sampling.generation import GenerationSettings, generate
from core.sampling.network import Network
from core.sampling.policies import POLICIES, remask_policy
from core.sampling.policies.guides import by_confidence
from core.sampling.prompt import lay_out_prompt
from core.sampling.replay import embedded_json, replay_data, write_html
from core.sampling.trace import Trace, TraceStep
from model import GPT, GPTConfig

LETTERS = 'abcde \n<&"'
BASE, V, T = len(LETTERS), len(LETTERS) + 4, 16
RULE = DrawRule(allowed_ids(V, BASE))
INSTALL = 'apt-get install -y chromium'
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--virtual-time-budget=20000')


def decode(ids):
    return ''.join((LETTERS + '_wpc')[token] for token in ids)


def make_trace(method='diffusion', policy=None, length=2 * T + 5, rows=3, batch=2, prompt=(1, 2, 7), causal=False):
    """A run of an untrained model in batches, several blocks long, with its texts."""
    config = GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=8, mask_token_id=BASE,
                       attention_type='causal' if causal else 'bidirectional')
    torch.manual_seed(2)
    model = GPT(config).eval().requires_grad_(False)
    placement = 'prefix' if causal else 'random'
    everyone = lay_out_prompt(prompt, length, BASE, keyed(5, 0, 0, rows), placement)
    trace, texts = Trace({'sampling_method': method, 'top_k': None}, everyone.protected), []
    settings = GenerationSettings(method, RULE, policy or remask_policy((0.8, 0.4, 0.1), 'ratio', 0.4, by_confidence), 3)
    for first in range(0, rows, batch):
        generator = keyed(5, 0, first, min(batch, rows - first))
        made = generate(Network(model, TimingAccumulator()), lay_out_prompt(prompt, length, BASE, generator, placement),
                        settings, generator, trace.add)
        texts += made.tokens.tolist()
    return trace, texts


def steps_of(trace, row):
    """The steps of one sample that are frames, each with the sample's own values."""
    return [(step, int((step.rows == row).nonzero())) for step in trace.steps
            if row in step.rows.tolist() and step.event != 'start']


def page_data(path):
    return json.loads(re.search(r'<script type="application/json" id="trace">(.*?)</script>', path.read_text(),
                                re.DOTALL).group(1))


RUNS = {'remask': {}, 'multinomial': {'method': 'multinomial'}, 'standard': {'method': 'standard'},
        'causal': {'method': 'standard', 'causal': True}, 'no prompt': {'prompt': ()},
        'adaptive': {'policy': POLICIES['entropy_bounded'].make(entropy_bound=1.0)},
        'remdm': {'policy': POLICIES['remdm_cap'].make(iterations=6, idle_cache=True, remdm_eta=0.3)}}


@pytest.mark.parametrize('run', RUNS)
def test_the_page_holds_the_trace(tmp_path, run):
    """From the page's data alone every step's tokens, changes and confidences come back."""
    trace, texts = make_trace(**RUNS[run])
    write_html(trace, decode, tmp_path / 'page.html')
    data = page_data(tmp_path / 'page.html')
    assert data == replay_data(trace, decode)
    assert data['settings'] == {'sampling_method': trace.settings['sampling_method'], 'top_k': 'None'}
    for row, sample in enumerate(data['samples']):
        assert sample['protected'] == trace.protected[row].nonzero().squeeze(1).tolist()
        state, confidence = [BASE] * data['length'], [0.0] * data['length']
        for position, token in zip(sample['protected'], sample['prompt']):
            state[position] = token
        steps = steps_of(trace, row)
        assert len(sample['frames']) == len(steps) > 3
        for frame, (step, place) in zip(sample['frames'], steps):
            assert [frame[name] for name in ('event', 'window', 'start', 'stop', 'step', 'steps')] == [
                step.event, step.window, step.start, step.start + step.tokens.size(1), step.step, step.steps]
            assert frame['positions'] == [step.start + at for at in step.changed[place].nonzero().squeeze(1).tolist()]
            assert ('tokens' in frame) == ('confidence' in frame) == (step.event == 'predict')
            for index, position in enumerate(frame['positions']):
                state[position] = frame['tokens'][index] if step.event == 'predict' else BASE
                if step.event == 'predict':
                    confidence[position] = frame['confidence'][index]
            assert state[frame['start']:frame['stop']] == step.tokens[place].tolist()
            assert confidence[frame['start']:frame['stop']] == pytest.approx(step.confidence[place].tolist(), abs=1e-4)
        assert state == texts[row]
        assert ''.join(data['pieces'][str(token)] for token in state) == decode(state)


def test_a_remasking_run_has_remaskings():
    frames = replay_data(make_trace()[0], decode)['samples'][0]['frames']
    assert [frame['event'] for frame in frames[:4]] == ['predict', 'remask', 'predict', 'remask']
    assert frames[1]['positions'] and set(frames[2]['positions']) == set(frames[1]['positions'])


HOSTILE = ['</script><script>document.title="broken"</script>', '<img src=x onerror="document.title=1">',
           '<!--<script>', ']]>', '&lt;&amp;', '"\'`\\', '\u2028\u2029', '\ud800', '\x00\x1b[2J\r\n',
           'DATA STYLE SCRIPT']


def hostile_trace():
    """One sample whose tokens and options are markup; position i is drawn at step i."""
    n = len(HOSTILE)
    trace = Trace({'start_text': HOSTILE[0], '<b>option</b>': HOSTILE[1], 'bound': math.inf},
                  torch.zeros(1, n, dtype=torch.bool))
    for step in range(n):
        at = torch.arange(n)[None]
        trace.add(TraceStep(0, 0, step, n, 'predict', torch.tensor([0]), torch.where(at <= step, at, n), at == step,
                            torch.full((1, n), -math.inf if step == 0 else -0.5, dtype=torch.float64)))
    return trace


def hostile_decode(ids):
    return ''.join(HOSTILE[token] for token in ids)


def test_no_text_becomes_markup(tmp_path):
    write_html(hostile_trace(), hostile_decode, tmp_path / 'page.html')
    text = (tmp_path / 'page.html').read_text(encoding='utf-8')
    assert text.count('<script') == text.count('</script>') == 2 and '<img' not in text and '<!--' not in text
    data = page_data(tmp_path / 'page.html')
    assert [data['pieces'][str(token)] for token in range(len(HOSTILE))] == HOSTILE
    assert data['settings'] == {'start_text': HOSTILE[0], '<b>option</b>': HOSTILE[1], 'bound': 'inf'}
    assert data['samples'][0]['frames'][0]['confidence'] == [None]  # JSON has no infinity


def test_embedded_json_is_harmless_and_exact():
    text = embedded_json(HOSTILE)
    assert json.loads(text) == HOSTILE and text.isascii() and not set('<>&') & set(text)
    with pytest.raises(ValueError):
        embedded_json(math.nan)


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    write_html(make_trace()[0], decode, tmp_path / 'page.html')
    text = (tmp_path / 'page.html').read_text()
    assert "default-src 'none'" in text
    assert not re.search(r'https?:|//[a-z]|url\(|@import|<link|<iframe|\ssrc=|\shref=|fetch\(|XMLHttp', text)


def test_a_failed_write_keeps_the_earlier_page(tmp_path):
    page = tmp_path / 'page.html'
    page.write_text('earlier')
    trace = hostile_trace()
    with pytest.raises(IndexError):
        write_html(trace, lambda ids: [][0], page)
    assert page.read_text() == 'earlier' and [entry.name for entry in tmp_path.iterdir()] == ['page.html']
    with pytest.raises(UserError, match='missing'):
        write_html(trace, hostile_decode, tmp_path / 'missing' / 'page.html')


def test_a_run_without_steps_is_a_page(tmp_path):
    write_html(Trace({}, torch.ones(1, 2, dtype=torch.bool)), decode, tmp_path / 'page.html')
    assert page_data(tmp_path / 'page.html')['samples'] == [
        {'sample': 0, 'protected': [0, 1], 'prompt': [None, None], 'frames': []}]


# In Chromium --------------------------------------------------------------------------------------------------------

class Browser:
    """Headless Chromium on copies of one page."""

    def __init__(self, folder, page):
        self.program = shutil.which('chromium') or pytest.fail(f'there is no chromium; install it: {INSTALL}')
        self.folder, self.page = folder, page.read_text(encoding='utf-8')

    def dom(self, fragment='', script='', *flags):
        """The page's document after it has run at `fragment`, then `script`."""
        at = self.folder / 'copy.html'
        at.write_text(self.page.replace('</body>', f'<script>{script}</script></body>'), encoding='utf-8')
        done = subprocess.run([self.program, *FLAGS, *flags, f'--user-data-dir={self.folder / "profile"}', '--dump-dom',
                               f'{at.as_uri()}{fragment}'], capture_output=True, timeout=120, check=True)
        return done.stdout.decode()

    def asked(self, expression, fragment='', script='', *flags):
        """The value of a JavaScript expression, given as JSON through the document's title."""
        document = self.dom(fragment, f'{script}; document.title = JSON.stringify({expression})', *flags)
        return json.loads(html.unescape(re.search('<title>(.*?)</title>', document, re.DOTALL).group(1)))


SHOWN = ("cells.map(cell => [cell.element.className.replace('cell ', '').replace(' outside', ''), "
         "cell.element.textContent])")


def expected_cells(data, row, number):
    """Kind and text of each position at frame `number`, worked out apart from the page."""
    sample = data['samples'][row]
    cells = [['masked', ' ']] * data['length']
    for position, token in zip(sample['protected'], sample['prompt']):
        cells[position] = ['protected', data['pieces'][str(token)].replace('\n', '↵')]
    for at, frame in enumerate(sample['frames'][:number], start=1):
        for index, position in enumerate(frame['positions']):
            if frame['event'] == 'predict':
                text = data['pieces'][str(frame['tokens'][index])].replace('\n', '↵')
                cells[position] = ['revealed' if at == number else 'settled', text]
            else:
                cells[position] = ['remasked', cells[position][1]] if at == number else ['masked', ' ']
    return cells


@pytest.fixture
def replay(tmp_path):
    trace, _ = make_trace()
    write_html(trace, decode, tmp_path / 'page.html')
    return Browser(tmp_path, tmp_path / 'page.html'), page_data(tmp_path / 'page.html')


@pytest.mark.browser
def test_every_step_in_the_browser(replay):
    """Jumping to a step shows it, and so does walking there and back."""
    browser, data = replay
    last = len(data['samples'][1]['frames'])
    walk = f'const seen = []; for (let at = 0; at <= {last}; at++) {{ go(at); seen.push({SHOWN}); }}'
    assert browser.asked('seen', '#sample=1', walk) == [expected_cells(data, 1, number) for number in range(last + 1)]
    assert browser.asked(SHOWN, '#sample=1&step=6') == expected_cells(data, 1, 6)
    assert browser.asked(SHOWN, '#sample=1&step=6', 'go(9); go(4)') == expected_cells(data, 1, 4)
    counts = browser.asked("['masked', 'revealed', 'remasked', 'settled', 'protected'].map("
                           "kind => Number(byId('count-' + kind).textContent))", '#sample=1&step=6')
    kinds = [kind for kind, _ in expected_cells(data, 1, 6)]
    assert counts == [kinds.count(kind) for kind in ('masked', 'revealed', 'remasked', 'settled', 'protected')]


@pytest.mark.browser
def test_keys_buttons_and_slider(replay):
    browser, data = replay
    last = len(data['samples'][0]['frames'])
    script = '''
        const seen = [], key = name => document.body.dispatchEvent(
            new KeyboardEvent('keydown', {key: name, bubbles: true}));
        const note = () => seen.push([sample.sample, frame, timer !== null, byId('play').textContent]);
        for (const name of ['ArrowRight', 'ArrowRight', 'ArrowLeft', 'End', 'ArrowRight', 'Home', 'ArrowLeft',
                            'ArrowDown', 'ArrowUp', ' ', ' ']) { key(name); note(); }
        for (const name of ['next', 'last', 'back', 'first', 'play', 'play']) { byId(name).click(); note(); }
        byId('slider').value = 5; byId('slider').dispatchEvent(new Event('input')); note();
        const slow = byId('speed').selectedIndex; key('+'); seen.push(byId('speed').selectedIndex - slow);'''
    still = [[0, at, False, 'Play'] for at in (1, 2, 1, last, last, 0, 0)]
    assert browser.asked('seen', '', script) == [
        *still, [1, 0, False, 'Play'], [0, 0, False, 'Play'], [0, 0, True, 'Pause'], [0, 0, False, 'Play'],
        *[[0, at, False, 'Play'] for at in (1, last, last - 1, 0)], [0, 0, True, 'Pause'], [0, 0, False, 'Play'],
        [0, 5, False, 'Play'], 1]


@pytest.mark.browser
def test_playing_reaches_the_end_and_stops(replay):
    browser, data = replay
    document = browser.dom('#sample=2&step=2&play')
    last = len(data['samples'][2]['frames'])
    assert f'{last}/{last}' in document and '<button id="play">Play</button>' in document


@pytest.mark.browser
def test_confidence_on_hover(replay):
    browser, data = replay
    frames = data['samples'][0]['frames']
    position, nats = frames[0]['positions'][0], frames[0]['confidence'][0]
    hover = (f"cells[{position}].element.dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}})); "
             f"const tip = byId('tip').textContent")
    shown = browser.asked("[tip, byId('tip').hidden, byId('tip').offsetHeight > 0]", '#step=1', hover)
    assert f'position {position}' in shown[0] and f'({nats:.2f} nats)' in shown[0] and shown[1:] == [False, True]
    percent = float(re.search(r'([\d.e+-]+)%', shown[0]).group(1))
    assert percent == pytest.approx(100 * math.exp(nats), rel=0.01)
    assert browser.asked("byId('tip').hidden", '#step=1', f"{hover}; onKey(new KeyboardEvent('keydown', "
                                                          "{key: 'Escape'}))") is True


@pytest.mark.browser
def test_kinds_differ_by_more_than_colour(replay):
    """Without colour, hatching, underline and strike alone tell the five kinds apart, by day and by night."""
    browser, _ = replay
    look = ("[...document.querySelectorAll('#legend .cell')].map(cell => { const look = getComputedStyle(cell); "
            "const solid = /rgba\\(0, 0, 0, 0\\)|transparent/.test(look.borderBottomColor) ? 'none' : "
            "look.borderBottomStyle; "
            "return [[look.backgroundImage.split('(')[0], solid, look.textDecorationLine].join(), "
            "look.color, look.backgroundColor + look.backgroundImage]; })")
    grounds = []
    for scheme in ('1', '0'):  # Chromium's numbers of light and dark
        looks = browser.asked(look, '#step=2', '', f'--blink-settings=preferredColorScheme={scheme}')
        assert len(looks) == 5 and len({form for form, _, _ in looks}) == 5
        assert len({colour + ground for _, colour, ground in looks}) == 5
        grounds.append(looks)
    assert not {colour for _, colour, _ in grounds[0]} & {colour for _, colour, _ in grounds[1]}


@pytest.mark.browser
@pytest.mark.parametrize('width', [320, 390, 1400])
def test_nothing_is_wider_than_the_screen(replay, width):
    """In a frame of the width of a phone, since a headless window may have a least width of its own."""
    browser, _ = replay
    report = ("parent.postMessage([innerWidth, document.documentElement.scrollWidth, "
              "Math.min(...[...document.querySelectorAll('button')].map(one => one.offsetHeight))], '*')")
    (browser.folder / 'inner.html').write_text(browser.page.replace('</body>', f'<script>{report}</script></body>'))
    outer = browser.folder / 'outer.html'
    outer.write_text('<title></title><script>onmessage = event => { document.title = JSON.stringify(event.data); }'
                     f'</script><iframe src="inner.html#step=3" style="width:{width}px;height:700px;border:0">')
    done = subprocess.run([browser.program, *FLAGS, f'--user-data-dir={browser.folder / "profile"}', '--dump-dom',
                           outer.as_uri()], capture_output=True, timeout=120, check=True).stdout.decode()
    inner, content, button = json.loads(re.search('<title>(.*?)</title>', done).group(1))
    assert inner == width and content <= width and button >= 44


@pytest.mark.browser
def test_hostile_text_is_only_text(tmp_path):
    write_html(hostile_trace(), hostile_decode, tmp_path / 'page.html')
    browser = Browser(tmp_path, tmp_path / 'page.html')
    last = len(HOSTILE)
    texts = browser.asked('cells.map(cell => cell.element.textContent)', f'#step={last}')
    assert texts[:5] == HOSTILE[:5] and texts[-3:] == ['\ufffd', '··[2J·↵', HOSTILE[-1]]
    found = browser.asked("[document.title, document.images.length, document.querySelectorAll('#text script, #text b, "
                          "#settings b').length, [...document.querySelectorAll('dd')][0].textContent]", f'#step={last}')
    assert found == ['Sampling replay', 0, 0, HOSTILE[0]]
    tip = browser.asked("byId('tip').textContent", f'#step={last}', 'showTip(0)')
    assert 'not finite' in tip


@pytest.mark.browser
def test_pages_without_steps_open(tmp_path):
    write_html(Trace({}, torch.ones(1, 2, dtype=torch.bool)), decode, tmp_path / 'page.html')
    assert Browser(tmp_path, tmp_path / 'page.html').asked(
        "[byId('status').textContent, cells.length, frame]", '#step=7') == ['0/0, start: 0 of 2 positions masked', 2, 0]
