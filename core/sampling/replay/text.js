'use strict';
// What a text looks like at a moment of its run: for the replay page and for the page of core/sampling/serving.
const byId = name => document.getElementById(name);
const LONGEST_WORD = 24;  // cells that stay on one line

function emptyState(length, fixed, prompt) {  // positions `fixed` hold the tokens `prompt`, the others are masked
  const kind = Array(length).fill('masked'), token = Array(length).fill(null);
  fixed.forEach((position, index) => {
    kind[position] = 'protected';
    token[position] = prompt[index];
  });
  return {kind, token, confidence: Array(length).fill(null), drawn: Array(length).fill(null)};
}

function settle(state, shown) {  // what was new in a frame is new no longer
  if (!shown) return;
  for (const position of shown.positions) {
    state.kind[position] = shown.event === 'predict' ? 'settled' : 'masked';
    if (shown.event === 'remask') state.token[position] = state.confidence[position] = null;
  }
}

function apply(state, shown) {  // what a frame did
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

function wellFormed(text) {  // half of a surrogate pair is no text
  return text.replace(/\p{Surrogate}/gu, '\ufffd');
}

function visible(text) {  // every control sign as one that can be seen
  return wellFormed(text).replace(/\n/g, '\u21b5').replace(/\t/g, '\u21e5').replace(/[\x00-\x1f\x7f-\x9f]/g, '\u00b7');
}

function cellsIn(box, texts) {  // one cell per position, in the lines and words of the finished text
  box.replaceChildren();
  const cells = [];
  let word = null;
  texts.forEach((text, position) => {
    if (!word || word.childElementCount >= LONGEST_WORD || /^\s+\S/.test(text)) {
      word = box.appendChild(document.createElement('span'));
      word.className = 'word';
    }
    const cell = word.appendChild(document.createElement('span'));
    cell.dataset.position = position;
    cell.style.minWidth = Math.max(1, visible(text).length) + 'ch';
    cells.push(cell);
    if (/\s$/.test(text)) word = null;
    for (const _ of text.matchAll(/\n/g)) box.appendChild(document.createElement('br'));
  });
  return cells;
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
