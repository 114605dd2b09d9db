"""One self-contained HTML page that replays a sampling run step by step in a browser.

The page holds the run as JSON, its own style and its own script; it asks for nothing from outside. Every text reaches
the screen through `textContent`, and the JSON is escaped, so no sample or prompt can become markup. page.html holds the
places for style.css, text.js, page.js and the run; the script works out which positions are masked from the events
alone.

A fragment opens the page at a place: replay.html#sample=1&step=12, with &play to start at once.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.common.files import write_whole
from core.sampling.trace import Trace

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
    """JSON that is safe inside a script element: ASCII without <, > and &."""
    text = json.dumps(data, separators=(',', ':'), allow_nan=False)
    for sign in '<>&':
        text = text.replace(sign, f'\\u{ord(sign):04x}')
    return text


def write_html(trace: Trace, decode_tokens: Decode, path: Path) -> None:
    """Write the page to `path`, whole or not at all; UserError where the file cannot be written."""
    write_whole(path, page_text(trace, decode_tokens))


def page_text(trace: Trace, decode_tokens: Decode) -> str:
    """The page of a run."""
    page, style, shared, script = map(replay_file, ('page.html', 'style.css', 'text.js', 'page.js'))
    page = page.replace('STYLE', style).replace('SCRIPT', f'{shared}\n{script}')
    before, after = page.split('DATA')
    return before + embedded_json(replay_data(trace, decode_tokens)) + after


def replay_file(name: str) -> str:
    """A file of the page."""
    return (Path(__file__).parent / name).read_text(encoding='utf-8')
