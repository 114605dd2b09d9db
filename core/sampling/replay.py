"""One self-contained HTML page that replays a sampling run step by step in a browser.

The page holds the run as JSON, its own style and its own script; it asks for nothing from outside. Every text reaches
the screen through `textContent`, and the JSON is escaped, so no sample or prompt can become markup.

A fragment opens the page at a place: replay.html#sample=1&step=12, with &play to start at once.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.common.files import atomic_writer
from core.sampling.generation import Trace

Decode = Callable[[list[int]], str]


def replay_data(trace: Trace, decode_tokens: Decode) -> dict[str, Any]:
    """The run in built-in types, as the page reads it: per sample where it starts and what each step changed.

    protected: positions; prompt: their tokens in that order; frames: the predictions and remaskings, positions counted
    from the start of the text, confidence in nats (None where it is not finite); pieces: each token's text, U+FFFD for
    a byte-level token that holds only a part of a character. Tokens that nobody changed are not repeated.
    """
    samples = [{'sample': number, 'protected': row.nonzero().squeeze(1).tolist(), 'frames': []}
               for number, row in enumerate(trace.protected)]
    prompts: list[dict[int, int]] = [{} for _ in samples]
    seen = set()
    for step in trace.steps:
        for row, tokens, changed, confidence in zip(step.rows.tolist(), step.tokens.tolist(), step.changed,
                                                    step.confidence.tolist()):
            if (row, step.window) not in seen:
                seen.add((row, step.window))
                prompts[row].update((step.start + place, token) for place, token in enumerate(tokens)
                                    if trace.protected[row, step.start + place])
            if step.event == 'start':  # nothing changes; the next prediction shows the window
                continue
            places = changed.nonzero().squeeze(1).tolist()
            frame = {'event': step.event, 'window': step.window, 'start': step.start, 'stop': step.start + len(tokens),
                     'step': step.step, 'steps': step.steps, 'positions': [step.start + place for place in places]}
            if step.event == 'predict':
                frame['tokens'] = [tokens[place] for place in places]
                frame['confidence'] = [round(confidence[place], 4) if math.isfinite(confidence[place]) else None
                                       for place in places]
            samples[row]['frames'].append(frame)
    for sample, prompt in zip(samples, prompts):
        sample['prompt'] = [prompt.get(position) for position in sample['protected']]
    used = {token for prompt in prompts for token in prompt.values()} | {
        token for sample in samples for frame in sample['frames'] for token in frame.get('tokens', ())}
    return {'settings': {name: str(value) for name, value in trace.settings.items()},
            'length': trace.protected.size(1), 'samples': samples,
            'pieces': {str(token): decode_tokens([token]) for token in sorted(used)}}


def embedded_json(data: object) -> str:
    """JSON that may stand inside a script element: ASCII without <, > and &."""
    text = json.dumps(data, separators=(',', ':'), allow_nan=False)
    for sign in '<>&':
        text = text.replace(sign, f'\\u{ord(sign):04x}')
    return text


def write_html(trace: Trace, decode_tokens: Decode, path: Path) -> None:
    """Write the page to `path`, whole or not at all; UserError where the file cannot be written."""
    page = _PAGE.replace('STYLE', _STYLE).replace('SCRIPT', _SCRIPT)
    before, after = page.split('DATA')
    with atomic_writer(Path(path)) as file:
        file.write((before + embedded_json(replay_data(trace, decode_tokens)) + after).encode())


_PAGE = '''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Sampling replay</title>
<style>STYLE</style>
</head>
<body>
<header>
<h1>Sampling replay</h1>
<p id="summary"></p>
</header>
<main>
<noscript><p>The replay needs JavaScript.</p></noscript>
<ul id="legend" aria-label="Kinds of position, and how many there are now">
<li><span class="cell masked"> </span> masked <b id="count-masked"></b></li>
<li><span class="cell revealed">a</span> just revealed <b id="count-revealed"></b></li>
<li><span class="cell remasked">a</span> just remasked <b id="count-remasked"></b></li>
<li><span class="cell settled">a</span> revealed before <b id="count-settled"></b></li>
<li><span class="cell protected">a</span> protected <b id="count-protected"></b></li>
</ul>
<div id="text" role="group" aria-label="Text"></div>
<details><summary>Options of the run</summary><dl id="settings"></dl></details>
<details><summary>Keys</summary><dl>
<dt>Space</dt><dd>play or pause</dd>
<dt>Left, Right</dt><dd>one step back or on</dd>
<dt>Home, End</dt><dd>first or last step</dd>
<dt>Up, Down</dt><dd>previous or next sample</dd>
<dt>Plus, Minus</dt><dd>faster or slower</dd>
</dl></details>
</main>
<footer>
<div id="now"><span id="status" aria-live="polite"></span> <span id="share"></span></div>
<svg id="chart" preserveAspectRatio="none" role="img" aria-label="Share of masked positions over the steps">
<path id="area"></path><line id="cursor" y1="0" y2="1"></line></svg>
<input id="slider" type="range" min="0" step="1" value="0" aria-label="Step">
<div id="controls">
<span id="buttons">
<button id="first" aria-label="First step">&laquo;</button>
<button id="back" aria-label="One step back">&lsaquo;</button>
<button id="play">Play</button>
<button id="next" aria-label="One step on">&rsaquo;</button>
<button id="last" aria-label="Last step">&raquo;</button>
</span>
<label>Sample <select id="sample"></select></label>
<label>Speed <select id="speed"></select></label>
</div>
</footer>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="trace">DATA</script>
<script>SCRIPT</script>
</body>
</html>
'''

_STYLE = '''
:root { color-scheme: light dark; --page: #fbfaf7; --bar: #f1efe9; --ink: #1d2126; --quiet: #5c636b; --line: #d4d0c6;
  --hatch: #c3bfb4; --new: #116329; --new-ground: #cdeed3; --back: #8a3b00; --back-ground: #ffe3c7;
  --fixed: #28418f; --fixed-ground: #e2e7fa; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181b; --bar: #1e2226; --ink: #e8e6e1; --quiet: #a2a8af; --line: #3a4046; --hatch: #4b5158;
    --new: #8be39d; --new-ground: #17401f; --back: #ffb070; --back-ground: #4d2a0b; --fixed: #b3c3ff;
    --fixed-ground: #262f55; } }
* { box-sizing: border-box; }
html { height: 100%; }
body { margin: 0; min-height: 100%; display: flex; flex-direction: column; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
header, main, footer > * { width: 100%; max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; margin: 1rem 0 0; }
#summary { margin: 0; color: var(--quiet); overflow-wrap: anywhere; }
main { flex: 1; padding-bottom: 1.5rem; }
#legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .8rem 0; padding: 0;
  font-size: .875rem; }
#legend b { display: inline-block; min-width: 3ch; font-variant-numeric: tabular-nums; }
#legend .cell { margin-right: .3rem; }
.cell, #text { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 1.0625rem; }
#text { line-height: 1.8; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 6px;
  overflow-wrap: anywhere; }
.word { display: inline-block; white-space: nowrap; }
.cell { display: inline-block; min-width: 1ch; height: 1.45em; line-height: 1.4em; vertical-align: middle;
  white-space: pre; border-bottom: 3px solid transparent; }
.masked { background: repeating-linear-gradient(-45deg, var(--hatch) 0 2px, transparent 2px 5px) padding-box;
  box-shadow: inset 1px 0 0 var(--page); }
.revealed { color: var(--new); background: var(--new-ground); font-weight: 700; border-bottom: 3px solid var(--new); }
.remasked { color: var(--back); text-decoration: line-through;
  background: repeating-linear-gradient(45deg, var(--back-ground) 0 4px, transparent 4px 6px) padding-box;
  border-bottom: 3px dotted var(--back); }
.protected { color: var(--fixed); background: var(--fixed-ground); border-bottom: 3px double var(--fixed); }
.outside { opacity: .6; }
.mark { opacity: .45; }
.revealed .mark, .remasked .mark { opacity: 1; }
.cell.chosen { outline: 2px solid var(--ink); outline-offset: 0; }
details { margin-top: 1rem; font-size: .9375rem; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .1rem 1rem; margin: .5rem 0; }
dt { color: var(--quiet); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
footer { position: sticky; bottom: 0; background: var(--bar); border-top: 1px solid var(--line); padding: .5rem 0; }
#now { display: flex; justify-content: space-between; gap: 1rem; font-variant-numeric: tabular-nums; }
#share { color: var(--quiet); white-space: nowrap; }
#chart { display: block; height: 2.2rem; padding: 0 1rem; }
#area { fill: var(--hatch); }
#cursor { stroke: var(--ink); stroke-width: 2; vector-effect: non-scaling-stroke; }
#slider { display: block; height: 1.75rem; accent-color: var(--fixed); padding: 0; width: calc(100% - 2rem);
  max-width: 60rem; }
#controls { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1.2rem; }
#buttons { display: flex; gap: .35rem; }
button, select { font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; min-height: 2.75rem; min-width: 2.75rem; padding: 0 .6rem; cursor: pointer; }
#play { min-width: 5rem; font-weight: 600; }
button:hover, select:hover { border-color: var(--quiet); }
:focus-visible { outline: 2px solid var(--fixed); outline-offset: 2px; }
#tip { position: fixed; z-index: 1; max-width: min(20rem, calc(100vw - 1rem)); padding: .35rem .6rem;
  border-radius: 6px; background: var(--ink); color: var(--page); font-size: .875rem; line-height: 1.4;
  pointer-events: none; white-space: pre-line; }
@media (max-width: 40rem) {
  header, main, footer > * { padding-left: .75rem; padding-right: .75rem; }
  #text { padding: .5rem; }
  #now { font-size: .875rem; line-height: 1.3; min-height: 2.6em; }
  #controls { gap: .4rem; justify-content: space-between; }
  #buttons { width: 100%; }
  #buttons button { flex: 1; } }
'''

# The page works out which positions are masked from the events alone: masked until drawn, and again when remasked.
# Cells keep their places through a replay: lines and words break where those of the finished text do.
_SCRIPT = r'''
'use strict';
const data = JSON.parse(document.getElementById('trace').textContent);
const byId = name => document.getElementById(name);
const SPEEDS = [1, 2, 4, 8, 16, 32];  // steps per second
const LONGEST_WORD = 24;  // cells that stay on one line
let sample, frame = 0, state, cells = [], timer = null, chosen = null;

function initialState() {
  const kind = Array(data.length).fill('masked'), token = Array(data.length).fill(null);
  sample.protected.forEach((position, index) => {
    kind[position] = 'protected';
    token[position] = sample.prompt[index];
  });
  return {kind, token, confidence: Array(data.length).fill(null), drawn: Array(data.length).fill(null)};
}

function settle(state, shown) {  // what was new in a frame is new no longer
  if (!shown) return;
  for (const position of shown.positions) {
    state.kind[position] = shown.event === 'predict' ? 'settled' : 'masked';
    if (shown.event === 'remask') state.token[position] = state.confidence[position] = null;
  }
}

function advance(state, number) {  // from frame number - 1 to frame number; frame 0 is the start
  settle(state, sample.frames[number - 2]);
  const shown = sample.frames[number - 1];
  shown.positions.forEach((position, index) => {
    if (shown.event === 'remask') {
      state.kind[position] = 'remasked';
      return;
    }
    state.kind[position] = 'revealed';
    state.token[position] = shown.tokens[index];
    state.confidence[position] = shown.confidence[index];
    state.drawn[position] = shown;
  });
}

function stateAt(number) {
  const state = initialState();
  for (let next = 1; next <= number; next++) advance(state, next);
  return state;
}

function piece(token) {
  return token === null ? '' : data.pieces[token];
}

function wellFormed(text) {  // half of a surrogate pair is no text
  return text.replace(/\p{Surrogate}/gu, '\ufffd');
}

function visible(text) {  // every control sign as one that can be seen
  return wellFormed(text).replace(/\n/g, '\u21b5').replace(/\t/g, '\u21e5').replace(/[\x00-\x1f\x7f-\x9f]/g, '\u00b7');
}

function layOut() {  // one cell per position, in the lines and words of the finished text
  const finished = stateAt(sample.frames.length), box = byId('text');
  box.replaceChildren();
  cells = [];
  let word = null;
  for (let position = 0; position < data.length; position++) {
    const text = piece(finished.token[position]);
    if (!word || word.childElementCount >= LONGEST_WORD || /^\s+\S/.test(text)) {
      word = box.appendChild(document.createElement('span'));
      word.className = 'word';
    }
    const cell = word.appendChild(document.createElement('span'));
    cell.dataset.position = position;
    cell.style.minWidth = Math.max(1, visible(text).length) + 'ch';
    cells.push({element: cell, key: null});
    if (/\s$/.test(text)) word = null;
    for (const _ of text.matchAll(/\n/g)) box.appendChild(document.createElement('br'));
  }
}

function fillCell(element, text) {  // signs that stand for control signs are fainter
  element.replaceChildren();
  for (const part of text.split(/([\x00-\x1f\x7f-\x9f]+)/)) {
    if (!part) continue;
    const control = /[\x00-\x1f\x7f-\x9f]/.test(part);
    const holder = control ? element.appendChild(document.createElement('span')) : element;
    if (control) holder.className = 'mark';
    holder.append(visible(part));
  }
}

function draw() {
  const shown = sample.frames[frame - 1] || sample.frames[0];
  const counts = {masked: 0, revealed: 0, remasked: 0, settled: 0, protected: 0};
  cells.forEach(({element, key}, position) => {
    const kind = state.kind[position], text = kind === 'masked' ? ' ' : piece(state.token[position]);
    const outside = shown && (position < shown.start || position >= shown.stop);
    counts[kind]++;
    const wanted = kind + outside + text;
    if (wanted === key) return;
    cells[position].key = wanted;
    element.className = 'cell ' + kind + (outside ? ' outside' : '');
    fillCell(element, text);
  });
  for (const kind in counts) byId('count-' + kind).textContent = counts[kind];
  byId('status').textContent = statusLine(counts);
  byId('share').textContent = `${Math.round(100 * (counts.masked + counts.remasked) / data.length)}% masked`;
  byId('slider').value = frame;
  byId('slider').setAttribute('aria-valuetext', byId('status').textContent);
  byId('cursor').setAttribute('x1', frame);
  byId('cursor').setAttribute('x2', frame);
  if (chosen !== null) showTip(chosen);
}

function place(shown) {
  const blocks = Math.max(...sample.frames.map(one => one.window)) + 1;
  return (blocks > 1 ? `block ${shown.window + 1} of ${blocks}, ` : '') + `step ${shown.step + 1} of ${shown.steps}`;
}

function statusLine(counts) {
  const where = `${frame}/${sample.frames.length}`;
  if (frame === 0) return `${where}, start: ${counts.masked} of ${data.length} positions masked`;
  const shown = sample.frames[frame - 1], event = shown.event === 'predict' ? 'revealed' : 'remasked';
  return `${where}, ${place(shown)}: ${shown.positions.length} ${event}`;
}

function drawChart() {
  const n = sample.frames.length, state = initialState(), shares = [];
  const share = () => state.kind.filter(kind => kind === 'masked' || kind === 'remasked').length / data.length;
  shares.push(share());
  for (let next = 1; next <= n; next++) {
    advance(state, next);
    shares.push(share());
  }
  byId('chart').setAttribute('viewBox', `0 0 ${Math.max(1, n)} 1`);
  byId('area').setAttribute('d', `M0 1 ${shares.map((value, x) => `L${x} ${1 - value}`).join(' ')} L${n} 1 Z`);
}

function describe(position) {
  const kind = state.kind[position], text = visible(piece(state.token[position]));
  if (kind === 'masked') return `position ${position}: masked`;
  const head = `position ${position}: \u201c${text}\u201d`;
  if (kind === 'protected') return `${head}\nprotected: part of the prompt, never changed`;
  const nats = state.confidence[position];
  const sure = nats === null ? 'not finite' : `${(100 * Math.exp(nats)).toPrecision(3)}% (${nats.toFixed(2)} nats)`;
  const drawn = `drawn at ${place(state.drawn[position])}\nprobability when drawn: ${sure}`;
  return kind === 'remasked' ? `${head} was remasked\n${drawn}` : `${head}\n${drawn}`;
}

function showTip(position) {
  const tip = byId('tip'), cell = cells[position].element, box = cell.getBoundingClientRect();
  if (chosen !== null) cells[chosen].element.classList.remove('chosen');
  chosen = position;
  cell.classList.add('chosen');
  tip.textContent = describe(position);
  tip.hidden = false;
  const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = left + 'px';
  tip.style.top = (above > 0 ? above : box.bottom + 6) + 'px';
}

function hideTip() {
  if (chosen !== null) cells[chosen].element.classList.remove('chosen');
  chosen = null;
  byId('tip').hidden = true;
}

function go(number) {
  const wanted = Math.min(Math.max(0, number), sample.frames.length);
  if (wanted === frame + 1) advance(state, wanted); else state = stateAt(wanted);
  frame = wanted;
  draw();
  if (timer === null) remember(); else follow();
}

function follow() {  // a long text moves to the block that begins
  const shown = sample.frames[frame - 1], before = sample.frames[frame - 2];
  if (shown && before && shown.window !== before.window) {
    cells[shown.positions[0] ?? shown.start].element.scrollIntoView({block: 'center'});
  }
}

function remember() {  // the fragment names the place, so that it can be passed on
  try {
    history.replaceState(null, '', `#sample=${sample.sample}&step=${frame}`);
  } catch {}  // a browser may refuse this for files or when it comes too often
}

function choose(index, number) {
  hideTip();
  sample = data.samples[Math.min(Math.max(0, index), data.samples.length - 1)];
  byId('sample').value = sample.sample;
  byId('slider').max = sample.frames.length;
  layOut();
  drawChart();
  frame = 0;
  state = initialState();
  go(number);
}

function play() {
  if (frame >= sample.frames.length) go(0);
  byId('play').textContent = 'Pause';
  timer = setInterval(() => {
    if (frame < sample.frames.length) go(frame + 1);
    if (frame >= sample.frames.length) pause();
  }, 1000 / SPEEDS[byId('speed').selectedIndex]);
}

function pause() {
  clearInterval(timer);
  timer = null;
  byId('play').textContent = 'Play';
  remember();
}

function step(number) {
  if (timer !== null) pause();
  go(number);
}

function setSpeed(index) {
  byId('speed').selectedIndex = Math.min(Math.max(0, index), SPEEDS.length - 1);
  if (timer !== null) {
    clearInterval(timer);
    play();
  }
}

const KEYS = {
  ' ': () => timer === null ? play() : pause(),
  ArrowLeft: () => step(frame - 1), ArrowRight: () => step(frame + 1),
  Home: () => step(0), End: () => step(sample.frames.length),
  ArrowUp: () => choose(sample.sample - 1, frame), ArrowDown: () => choose(sample.sample + 1, frame),
  '+': () => setSpeed(byId('speed').selectedIndex + 1), '-': () => setSpeed(byId('speed').selectedIndex - 1),
  Escape: hideTip,
};

function onKey(event) {
  const own = event.target instanceof Element ? event.target.tagName : '';
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS) || own === 'SELECT' ||
      (event.key === ' ' && (own === 'BUTTON' || own === 'SUMMARY'))) return;
  event.preventDefault();
  KEYS[event.key]();
}

function open() {  // where the fragment says
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (timer !== null) pause();
  choose(Number(wanted.get('sample')) || 0, Number(wanted.get('step')) || 0);
  if (wanted.has('play')) play();
}

function overCell(event) {
  const cell = event.target.closest('.cell');
  if (cell) showTip(Number(cell.dataset.position)); else hideTip();
}

function begin() {
  for (const {sample: number} of data.samples) byId('sample').append(new Option(number, number));
  for (const speed of SPEEDS) byId('speed').append(new Option(`${speed}/s`));
  const most = Math.max(...data.samples.map(one => one.frames.length));
  byId('speed').selectedIndex = Math.max(1, SPEEDS.findLastIndex(speed => speed <= most / 12));  // 12 to 24 seconds
  const names = ['checkpoint_name', 'sampling_method', 'sampling_policy', 'seed'].filter(name => name in data.settings);
  byId('summary').textContent = names.map(name => `${name}=${wellFormed(data.settings[name])}`).join(', ');
  for (const [name, value] of Object.entries(data.settings)) {
    byId('settings').appendChild(document.createElement('dt')).textContent = wellFormed(name);
    byId('settings').appendChild(document.createElement('dd')).textContent = wellFormed(value);
  }
  byId('play').onclick = KEYS[' '];
  byId('first').onclick = KEYS.Home;
  byId('back').onclick = KEYS.ArrowLeft;
  byId('next').onclick = KEYS.ArrowRight;
  byId('last').onclick = KEYS.End;
  byId('slider').oninput = event => step(Number(event.target.value));
  byId('sample').onchange = event => choose(Number(event.target.value), frame);
  byId('speed').onchange = event => setSpeed(event.target.selectedIndex);
  byId('text').onpointerover = overCell;
  byId('text').onpointerleave = event => event.pointerType === 'mouse' && hideTip();
  document.onpointerdown = event => event.target.closest('#text') ? overCell(event) : hideTip();
  document.onscroll = hideTip;
  document.onkeydown = onKey;
  window.onhashchange = open;
  open();
}

begin();
'''
