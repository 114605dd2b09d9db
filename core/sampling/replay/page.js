const data = JSON.parse(document.getElementById('trace').textContent);
const SPEEDS = [1, 2, 4, 8, 16, 32];  // steps per second
let sample, frame = 0, state, cells = [], timer = null, chosen = null;

function initialState() {
  return emptyState(data.length, sample.protected, sample.prompt);
}

function advance(state, number) {  // from frame number - 1 to frame number; frame 0 is the start
  settle(state, sample.frames[number - 2]);
  apply(state, sample.frames[number - 1]);
}

function stateAt(number) {
  const state = initialState();
  for (let next = 1; next <= number; next++) advance(state, next);
  return state;
}

function piece(token) {
  return token === null ? '' : data.pieces[token];
}

function layOut() {
  const finished = stateAt(sample.frames.length);
  cells = cellsIn(byId('text'), finished.token.map(piece)).map(element => ({element, key: null}));
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
