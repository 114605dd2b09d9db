'use strict';
// Every text reaches the screen through textContent.
const DOUBTS = [0.75, 0.5, 0.25];  // wrongness of the three shades, the strongest first
let offers, running = null;
const panes = [];

function copyOf(template) {
  return byId(template).content.firstElementChild.cloneNode(true);
}

// The settings -----------------------------------------------------------------------------------------------------

function addSettings(box, title) {
  const set = box.appendChild(copyOf('settings-template'));
  set.querySelector('legend').textContent = title;
  const policy = field(box, 'sampling_policy'), preset = field(box, 'preset');
  preset.append(new Option('none', ''));
  for (const name in offers.presets) preset.append(new Option(name, name));
  for (const name in offers.policies) policy.append(new Option(name, name));
  for (const name in offers.values) if (field(box, name)) field(box, name).value = offers.values[name] ?? '';
  field(box, 'sequence_length').value = offers.length;
  field(box, 'sequence_length').max = offers.longest;
  field(box, 'iterations').max = offers.most_steps;
  policy.parentElement.hidden = !policy.options.length;
  preset.parentElement.hidden = preset.options.length < 2;
  preset.onchange = () => {
    const options = preset.value ? offers.presets[preset.value].options : offers.values;
    for (const name of ['sampling_policy', 'iterations', 'temperature']) field(box, name).value = options[name];
    explain(box);
  };
  policy.onchange = () => explain(box);
  explain(box);
}

function field(box, name) {
  return box.querySelector(`[data-name="${name}"]`);
}

function explain(box) {  // what the policy does; whether it takes a number of steps
  const policy = offers.policies[field(box, 'sampling_policy').value];
  const preset = offers.presets[field(box, 'preset').value];
  box.querySelector('.about').textContent = [preset?.summary, policy?.summary].filter(Boolean).join('; ');
  field(box, 'iterations').disabled = policy ? !policy.steps : !offers.steps;
}

function request(box, taken) {  // what the server is asked for; taken: the tokens and marks of a redraw
  const asked = {...taken};
  for (const input of box.querySelectorAll('[data-name]')) {
    const name = input.dataset.name;
    if (input.disabled || input.parentElement.hidden) continue;
    if (name !== 'preset' || input.value) {
      asked[name] = input.tagName === 'SELECT' ? input.value : Number(input.value);
    }
  }
  if (byId('doubt').checked) asked.doubt = true;
  if (taken) {
    delete asked.sequence_length;
    return asked;
  }
  const text = byId('prompt').value, gap = offers.values.infill_char;
  if (offers.gaps && text.includes(gap)) {
    asked.infill_text = text;
    asked.infill_char = gap;
    delete asked.sequence_length;
  } else if (text) asked.start_text = text;
  return asked;
}

function makeGap() {
  const prompt = byId('prompt'), start = prompt.selectionStart, end = Math.max(prompt.selectionEnd, start);
  const count = Math.max(1, [...prompt.value.slice(start, end)].length);
  prompt.setRangeText(offers.values.infill_char.repeat(count), start, end, 'end');
  prompt.focus();
}

// A run on the screen ------------------------------------------------------------------------------------------------

class Pane {
  constructor(title, settings) {
    this.settings = settings;
    this.element = byId('panes').appendChild(copyOf('pane-template'));
    this.find('h2').textContent = title;
    this.find('.text').setAttribute('aria-label', `${title}, its tokens`);
    this.find('.text').onclick = event => this.click(event);
    this.find('.text').onkeydown = event => this.key(event);
    this.find('.text').onpointerover = event => {
      const cell = event.target.closest('.cell');
      if (cell) this.find('.token').textContent = this.describe(Number(cell.dataset.position));
    };
    this.find('.slider').oninput = event => this.go(Number(event.target.value));
    this.find('.redraw').onclick = () => start([this], {tokens: this.tokens, take_back: [...this.marked]});
    this.clear();
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  clear() {
    Object.assign(this, {frames: [], pieces: {}, marked: new Set(), tokens: null, at: 0, cells: [], shown: 0});
    this.find('.text').replaceChildren();
    this.find('.keep').hidden = true;
    this.find('.slider').disabled = true;
    this.find('.told').textContent = this.find('.token').textContent = '';
    this.say('waiting');
    this.mark();
  }

  say(words) {
    this.find('.status').textContent = words;
  }

  hear(event) {  // a line from the server
    if (event.event === 'waiting') this.say(event.before === 1 ? 'one run is before this one' :
      `${event.before} runs are before this one`);
    else if (event.event === 'start') this.begin(event);
    else if (event.event === 'frame') this.addFrame(event);
    else if (event.event === 'done') this.finish(event);
    else if (event.event === 'problem') tellProblems(event.problems);
  }

  begin(event) {
    Object.assign(this, {length: event.length, fixed: event.protected, prompt: event.prompt, pieces: event.pieces,
      blocks: new Set(event.blocks), state: emptyState(event.length, event.protected, event.prompt)});
    this.find('.told').textContent = event.said.join('; ');
    this.layOut();
    this.draw();
  }

  addFrame(event) {
    Object.assign(this.pieces, event.pieces);
    this.frames.push({...event.frame, doubt: event.doubt});
    settle(this.state, this.frames[this.frames.length - 2]);
    apply(this.state, event.frame);
    this.shown = this.frames.length;
    this.draw();
  }

  finish(event) {
    this.tokens = event.tokens;
    this.layOut();
    this.draw();
    this.find('.slider').max = this.frames.length;
    this.find('.slider').value = this.frames.length;
    this.find('.slider').disabled = false;
    this.find('.html').href = `/runs/${event.run}/run.html`;
    this.find('.json').href = `/runs/${event.run}/run.json`;
    this.find('.gif').href = `/runs/${event.run}/run.gif`;
    this.find('.keep').hidden = false;
    this.say(`finished: ${event.trunk_calls} trunk calls, ${event.seconds.toFixed(2)} s`);
    this.mark();
  }

  layOut() {  // cells of one token each; in the lines of the finished text once there is one
    const texts = this.tokens ? this.tokens.map(token => this.piece(token)) : Array(this.length).fill(' ');
    this.cells = cellsIn(this.find('.text'), texts);
    this.cells.forEach((cell, position) => {
      cell.id = `${this.settings.id}-${position}`;
      cell.setAttribute('role', 'option');
    });
  }

  piece(token) {
    return token === null ? '' : this.pieces[token] ?? '\ufffd';
  }

  go(number) {
    this.state = emptyState(this.length, this.fixed, this.prompt);
    for (let next = 0; next < number; next++) {
      settle(this.state, this.frames[next - 1]);
      apply(this.state, this.frames[next]);
    }
    this.shown = number;
    this.draw();
    this.say(number ? this.place() : 'start');
  }

  place() {
    const shown = this.frames[this.shown - 1];
    return `step ${shown.step + 1} of ${shown.steps}: ${shown.positions.length} ` +
      (shown.event === 'predict' ? 'revealed' : 'taken back');
  }

  draw() {
    const doubts = this.doubts();
    this.cells.forEach((cell, position) => {
      const kind = this.state.kind[position], marked = this.marked.has(position);
      const shade = doubts[position] === undefined ? -1 : DOUBTS.findIndex(least => doubts[position] >= least);
      cell.className = ['cell', kind, ...(marked ? ['marked'] : []), ...(this.blocks.has(position) ? ['block'] : []),
        ...(shade >= 0 && !marked ? [`doubt-${3 - shade}`] : []), ...(this.at === position ? ['at'] : [])].join(' ');
      fillCell(cell, kind === 'masked' ? ' ' : this.piece(this.state.token[position]));
      cell.setAttribute('aria-selected', marked);
      cell.setAttribute('aria-label', kind === 'masked' ? 'masked' : visible(this.piece(this.state.token[position])));
    });
    if (this.shown && !this.tokens) this.say(this.place());
  }

  doubts() {  // position: how wrong the critic found its token when it was asked last, up to the frame that is shown
    const found = {};
    for (const frame of this.frames.slice(0, this.shown)) {
      frame.doubt?.forEach((wrong, index) => { found[frame.start + index] = wrong; });
    }
    this.state.kind.forEach((kind, position) => {
      if (kind !== 'revealed' && kind !== 'settled') delete found[position];
    });
    return found;
  }

  describe(position) {  // a token in words
    const kind = this.state.kind[position], nats = this.state.confidence[position], doubt = this.doubts()[position];
    if (kind === 'masked') return `position ${position}: masked`;
    const sure = nats === null ? '' : `, probability ${(100 * Math.exp(nats)).toPrecision(2)}%`;
    return `position ${position}: \u201c${visible(this.piece(this.state.token[position]))}\u201d` +
      (kind === 'protected' ? ', given' : sure) +
      (doubt === undefined ? '' : `, doubt ${Math.round(100 * doubt)}%`);
  }

  tokenBeyond(direction) {  // the nearest token of the next line, below (1) or above (-1)
    const boxes = this.cells.map(cell => cell.getBoundingClientRect()), now = boxes[this.at];
    let best = this.at, line = null;
    for (let other = this.at + direction; other in boxes; other += direction) {
      if (Math.abs(boxes[other].top - now.top) < 4) continue;
      line ??= boxes[other].top;
      if (Math.abs(boxes[other].top - line) > 4) break;
      const distance = box => Math.abs(box.left - now.left);
      if (best === this.at || distance(boxes[other]) < distance(boxes[best])) best = other;
    }
    return best;
  }

  canMark(position) {
    return this.tokens !== null && running === null && offers.gaps && position in this.cells;
  }

  toggle(position) {
    if (!this.canMark(position)) return;
    if (!this.marked.delete(position)) this.marked.add(position);
    this.draw();
    this.mark();
  }

  mark() {
    const count = this.marked.size, button = this.find('.redraw');
    button.disabled = !count || running !== null;
    button.textContent = count ? `Redraw ${count} marked` : 'Redraw';
  }

  click(event) {
    const cell = event.target.closest('.cell');
    if (!cell) return;
    this.at = Number(cell.dataset.position);
    this.toggle(this.at);
    this.point();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.cells.length) return;
    const moves = {ArrowLeft: this.at - 1, ArrowRight: this.at + 1, Home: 0, End: this.cells.length - 1,
      ArrowUp: this.tokenBeyond(-1), ArrowDown: this.tokenBeyond(1)};
    if (event.key in moves) {
      this.at = Math.min(Math.max(0, moves[event.key]), this.cells.length - 1);
      this.point();
    } else if (event.key === ' ' || event.key === 'Enter') this.toggle(this.at);
    else return;
    event.preventDefault();
  }

  point() {
    this.find('.at')?.classList.remove('at');
    this.cells[this.at].classList.add('at');
    this.find('.text').setAttribute('aria-activedescendant', this.cells[this.at].id);
    this.find('.token').textContent = this.describe(this.at);
  }
}

// Runs ---------------------------------------------------------------------------------------------------------------

function tellProblems(problems) {
  const list = byId('problems');
  for (const problem of problems) list.appendChild(document.createElement('li')).textContent = wellFormed(problem);
  list.hidden = !list.childElementCount;
}

async function write(pane, asked, signal) {  // one run, line by line
  const answer = await fetch('/run', {method: 'POST', headers: {'Content-Type': 'application/json'},
                                      body: JSON.stringify(asked), signal});
  if (!answer.ok) {
    tellProblems((await answer.json()).problems);
    pane.say('not written');
    return;
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) pane.hear(JSON.parse(line));
  }
  if (pane.tokens === null) pane.say('not finished');
}

async function start(chosen, taken) {
  if (running !== null) return;
  byId('problems').replaceChildren();
  tellProblems([]);
  const asked = chosen.map(pane => {
    if (taken) field(pane.settings, 'seed').value = Number(field(pane.settings, 'seed').value) + 1;
    return request(pane.settings, taken);
  });
  running = new AbortController();
  setRunning();
  chosen.forEach(pane => pane.clear());
  const {signal} = running;
  await Promise.all(chosen.map((pane, index) => write(pane, asked[index], signal).catch(error => {
    pane.say(signal.aborted ? 'stopped' : 'the server does not answer');
  })));
  running = null;
  setRunning();
}

function setRunning() {
  byId('write').disabled = running !== null;
  byId('stop').disabled = running === null;
  byId('legend').hidden = false;
  byId('doubt-legend').hidden = !byId('doubt').checked;
  for (const pane of panes) pane.mark();
}

function arrange() {  // one pane or two
  const two = byId('compare').checked;
  byId('settings-b').hidden = !two;
  byId('settings-a').querySelector('legend').textContent = two ? 'Settings A' : 'Settings';
  byId('panes').replaceChildren();
  panes.splice(0, panes.length, new Pane(two ? 'Text A' : 'Text', byId('settings-a')));
  if (two) panes.push(new Pane('Text B', byId('settings-b')));
  for (const pane of panes) pane.say('nothing written yet');
}

async function begin() {
  offers = await (await fetch('/offers')).json();
  byId('summary').textContent = wellFormed(offers.model);
  byId('gap-sign').textContent = offers.values.infill_char;
  byId('notes').replaceChildren(...offers.notes.map(note => {
    const line = document.createElement('li');
    line.textContent = note;
    return line;
  }));
  byId('notes').hidden = !offers.notes.length;
  byId('gap').hidden = !offers.gaps;
  if (!offers.gaps) byId('prompt-help').textContent = 'The model writes on after the text.';
  byId('doubt-label').hidden = !offers.critic;
  addSettings(byId('settings-a'), 'Settings');
  addSettings(byId('settings-b'), 'Settings B');
  arrange();
  byId('compare').onchange = () => {
    running?.abort();
    arrange();
  };
  byId('gap').onclick = makeGap;
  byId('stop').onclick = () => running?.abort();
  byId('form').onsubmit = event => {
    event.preventDefault();
    start(panes);
  };
  document.onkeydown = event => {
    if (event.key === 'Escape') running?.abort();
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) byId('form').requestSubmit();
  };
  document.body.dataset.ready = 'yes';
}

begin();
