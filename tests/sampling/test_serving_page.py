"""The page of sample.py --serve=True in Chromium, by clicks and keys."""

import math

import pytest

from core.data.vocabulary import Vocabulary
from helpers.chromium import CONTROL, Page
from helpers.sampling import sample
from helpers.serving import served
from helpers.toys import model_over, save_model

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>&amp;'
LETTERS = Vocabulary(kind='characters', tokens=tuple(sorted({*'\n abcdefghKING:_', *HOSTILE})))
FINISHED = 'running === null && panes.every(pane => pane.tokens !== null)'
TEXTS = "panes.map(pane => pane.tokens.map(token => pane.piece(token)).join(''))"


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('page')
    save_model(folder / 'ckpt_best.pt', LETTERS, model_over(LETTERS, block_size=96, add_critic_head=True))
    return folder


@pytest.fixture(scope='module')
def browser(folder):
    """The page, on a server with eight steps and 24 tokens as its defaults."""
    with served(folder, '--iterations=8', '--sequence_length=24') as server, Page(folder) as page:
        page.address = f'http://127.0.0.1:{server.server_port}/'
        yield page


@pytest.fixture
def page(browser):
    browser.events.clear()
    browser.resize(1200, 1000)
    browser.scheme('light')
    browser.open(browser.address)
    yield browser
    assert browser.complaints() == []


def test_a_text_by_clicks_is_the_command_lines(page, folder):
    page.click('#prompt')
    page.type('KING:\n')
    page.click('#write')
    page.until(FINISHED)
    result, _ = sample(folder, '--num_samples=1', '--iterations=8', '--sequence_length=24', '--start_text=KING:\\n')
    assert page.ask(TEXTS) == result.texts
    shown = page.ask("[...document.querySelectorAll('.text .cell')].map(cell => cell.textContent).join('')")
    assert shown == result.texts[0].replace('\n', '↵')
    assert page.ask("[...document.querySelectorAll('.text .protected')].length") == 6
    links = page.ask("[...document.querySelectorAll('.keep a')].map(link => link.textContent)")
    assert links == ['HTML', 'GIF', 'JSON']
    statuses = page.ask("Promise.all([...document.querySelectorAll('.keep a')].map(link => fetch(link.href).then("
                        "answer => answer.status)))")
    assert statuses == [200, 200, 200]


def test_the_keyboard_alone(page, folder):
    """Tab to the prompt, write, walk into the text, mark two tokens, redraw them, and look at a step."""
    page.press('Tab')
    assert page.ask('document.activeElement.id') == 'prompt'
    page.type('bad ')
    page.press('Enter', CONTROL)
    page.until(FINISHED)
    before = page.ask('panes[0].tokens')
    for _ in range(30):
        page.press('Tab')
        if page.ask("document.activeElement.classList.contains('text')"):
            break
    for key in ('End', ' ', 'ArrowLeft', 'ArrowLeft', 'Enter', 'Home', 'ArrowRight', ' ', ' '):
        page.press(key)
    assert page.ask('[...panes[0].marked].sort((a, b) => a - b)') == [21, 23]
    assert page.ask("document.querySelector('.redraw').textContent") == 'Redraw 2 marked'
    for _ in range(3):
        page.press('Tab')
        if page.ask("document.activeElement.classList.contains('redraw')"):
            break
    page.press('Enter')
    page.until(f'{FINISHED} && panes[0].marked.size === 0')
    after = page.ask('panes[0].tokens')
    assert [at for at in range(24) if at not in (21, 23) and before[at] != after[at]] == []
    assert page.ask("field(panes[0].settings, 'seed').value") == '1338'
    assert page.ask('panes[0].frames.every(frame => frame.positions.every(at => at === 21 || at === 23))')
    page.ask("document.querySelector('.slider').focus()")
    page.press('Home')
    assert page.ask("document.querySelectorAll('.text .masked').length") == 2


def test_gaps(page, folder):
    page.click('#prompt')
    page.type('head bag')
    page.ask("byId('prompt').setSelectionRange(2, 5)")
    page.click('#gap')
    assert page.ask("byId('prompt').value") == 'he___bag'
    page.click('#write')
    page.until(FINISHED)
    result, _ = sample(folder, '--num_samples=1', '--iterations=8', '--infill_text=he___bag')
    assert page.ask(TEXTS) == result.texts


def test_the_page_of_a_block_model_says_what_it_cannot_do(page, tmp_path):
    save_model(tmp_path / 'ckpt_best.pt', LETTERS, model_over(LETTERS, block_size=96, attention_type='block',
                                                              block_length=(8,), add_critic_head=True))
    with served(tmp_path, '--sequence_length=24') as server:
        page.resize(380, 900)
        page.open(f'http://127.0.0.1:{server.server_port}/')
        notes = page.ask("[...document.querySelectorAll('#notes li')].map(note => note.textContent)")
        assert len(notes) == 3 and 'blocks of 8 tokens' in notes[0]
        shown = page.ask("['#gap', '#doubt-label', '[data-name=preset]', '[data-name=sampling_policy]'].map("
                         "name => document.querySelector(name).getClientRects().length > 0)")
        assert shown == [False, False, False, True]
        page.click('#prompt')
        page.type('a_b')
        page.click('#write')
        page.until(FINISHED)
        assert page.ask(TEXTS)[0].startswith('a_b')
        assert page.ask("document.documentElement.scrollWidth <= innerWidth")


def test_two_settings_side_by_side(page, folder):
    page.click('#compare')
    page.ask("field(byId('settings-b'), 'sampling_policy').focus()")
    page.ask("field(byId('settings-b'), 'sampling_policy').value = 'first_hitting'; "
             "field(byId('settings-b'), 'sampling_policy').onchange()")
    assert page.ask("field(byId('settings-b'), 'iterations').disabled") is True
    page.click('#doubt')
    page.click('#write')
    page.until(FINISHED)
    texts = [sample(folder, '--num_samples=1', '--sequence_length=24', *rest)[0].texts[0] for rest in (
        ('--iterations=8',), ('--sampling_policy=first_hitting',))]
    assert page.ask(TEXTS) == texts and texts[0] != texts[1]
    left, right = page.ask("[...document.querySelectorAll('.pane')].map(pane => pane.getBoundingClientRect().left)")
    assert right > left
    assert page.ask("document.querySelectorAll('.text .cell[class*=doubt-]').length") > 0


def test_a_token_in_words_and_up_and_down(page, folder):
    """Doubt of every token that was judged, in the text's first window too; arrows keep to the column."""
    page.ask("field(byId('settings-a'), 'sequence_length').value = 150")  # two windows
    page.click('#doubt')
    page.click('#write')
    page.until(FINISHED)
    doubts = page.ask('panes[0].doubts()')
    assert set(doubts) == {str(at) for at in range(150)}
    last = [page.ask(f'panes[0].frames.findLast(frame => frame.doubt && frame.start <= {at} && {at} < frame.stop)'
                     f'.doubt[{at} - panes[0].frames.findLast(frame => frame.doubt && frame.start <= {at} && '
                     f'{at} < frame.stop).start]') for at in (0, 20, 149)]
    assert [doubts[str(at)] for at in (0, 20, 149)] == last
    page.ask("document.querySelector('.text').focus()")
    for key in ('Home', 'ArrowRight', 'ArrowRight'):
        page.press(key)
    token, nats = page.ask('[visible(panes[0].piece(panes[0].tokens[2])), panes[0].state.confidence[2]]')
    said = page.ask("document.querySelector('.token').textContent")
    assert said.startswith(f'position 2: \u201c{token}\u201d, probability ') and said.endswith(
        f', doubt {int(100 * doubts["2"] + 0.5)}%')
    assert float(said.split('probability ')[1].split('%')[0]) == pytest.approx(100 * math.exp(nats), rel=0.06)
    top = "panes[0].cells[panes[0].at].getBoundingClientRect().top"
    tops = []
    for key in ('Home', 'ArrowDown', 'ArrowDown', 'ArrowUp', 'ArrowUp', 'ArrowUp'):
        page.press(key)
        tops.append(page.ask(top) + page.ask('scrollY'))
    assert tops[0] < tops[1] < tops[2] and tops[3:] == [tops[1], tops[0], tops[0]]


def test_stopping(page):
    page.ask("field(panes[0].settings, 'iterations').value = 1000")
    page.click('#write')
    page.until('panes[0].frames.length > 2')
    page.press('Escape')
    page.until("running === null && document.querySelector('.status').textContent === 'stopped'")
    assert page.ask('panes[0].tokens') is None
    page.ask("field(panes[0].settings, 'iterations').value = 2")
    page.click('#write')
    page.until(FINISHED)


def test_problems_are_shown(page):
    page.click('#prompt')
    page.type('xyz')
    page.click('#write')
    page.until("!byId('problems').hidden && running === null")
    assert page.ask("byId('problems').textContent") and page.ask('panes[0].tokens') is None
    page.events.clear()  # the browser logs an answer of 400


def test_presets(page):
    page.ask("field(byId('settings-a'), 'preset').value = 'fast'; field(byId('settings-a'), 'preset').onchange()")
    values = "['sampling_policy', 'iterations', 'temperature'].map(name => field(byId('settings-a'), name).value)"
    assert page.ask(values) == ['strided', '8', '0.7']
    page.click('#write')
    page.until(FINISHED)
    assert 'preset fast' in page.ask("document.querySelector('.told').textContent")


def test_a_prompt_stays_text(page):
    page.ask("field(panes[0].settings, 'sequence_length').value = 90")
    page.click('#prompt')
    page.type(HOSTILE)
    page.click('#write')
    page.until(FINISHED)
    shown = page.ask("[...document.querySelectorAll('.text .protected')].map(cell => cell.textContent).join('')")
    assert shown == HOSTILE
    assert page.ask("[document.title, document.images.length, document.querySelectorAll('.text script').length]") == [
        'Write with a diffusion model', 0, 0]


@pytest.mark.parametrize('width', [320, 380, 1400])
def test_nothing_is_wider_than_the_screen(page, width):
    page.resize(width, 800)
    page.click('#compare')
    page.click('#write')
    page.until(FINISHED)
    assert page.ask('document.documentElement.scrollWidth') <= width
    assert page.ask("Math.min(...[...document.querySelectorAll('button, select, .slider, .check')].filter(one => "
                    "one.offsetHeight).map(one => one.offsetHeight))") >= 44


CONTRASTS = """(() => {
  const light = ([r, g, b]) => [r, g, b].map(value => value / 255).map(value => value <= .04045 ? value / 12.92 :
    ((value + .055) / 1.055) ** 2.4).reduce((sum, value, index) => sum + value * [.2126, .7152, .0722][index], 0);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const look = getComputedStyle(element), found = numbers(look.backgroundColor);
      const drawn = look.backgroundImage.match(/rgb\\([^)]*\\)/);
      if (drawn) return numbers(drawn[0]);
      if (found.length < 4 || found[3] > 0) return found;
    }
  };
  const own = element => [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  return [...document.querySelectorAll('body *')].filter(element => element.offsetHeight && own(element) &&
      !element.closest('.mark') && !element.disabled && element.tagName !== 'OPTION')
    .map(element => [light(numbers(getComputedStyle(element).color)), light(ground(element)), element.className ||
      element.tagName]).map(([one, other, name]) => [(Math.max(one, other) + .05) / (Math.min(one, other) + .05), name])
    .sort((a, b) => a[0] - b[0]);
})()"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_contrast(page, scheme):
    """WCAG AA: 4.5 for text of this size; every kind of cell is in the legend."""
    page.scheme(scheme)
    page.click('#doubt')
    page.click('#write')
    page.until(FINISHED)
    page.click('.text .cell')
    found = page.ask(CONTRASTS)
    assert len(found) > 40 and found[0][0] >= 4.5, found[:5]


def test_marks_differ_by_more_than_colour(page):
    looks = page.ask("[...document.querySelectorAll('#legend li:not([hidden]) .cell')].map(cell => { const look = "
                     "getComputedStyle(cell); const none = /rgba\\(0, 0, 0, 0\\)/.test(look.borderBottomColor); return "
                     "[look.backgroundImage.split('(')[0], none ? 'none' : look.borderBottomStyle, "
                     "look.textDecorationLine, look.textDecorationStyle].join(); })")
    assert len(looks) == len(set(looks)) == 6, looks
