"""A page in headless Chromium, driven by real clicks and keys over the pipe of the DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

INSTALL = 'apt-get install -y chromium'
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--remote-debugging-pipe')
KEYS = {'Enter': (13, '\r'), ' ': (32, ' '), 'Tab': (9, ''), 'Escape': (27, ''), 'ArrowLeft': (37, ''),
        'ArrowRight': (39, ''), 'ArrowUp': (38, ''), 'ArrowDown': (40, ''), 'Home': (36, ''), 'End': (35, '')}
CONTROL = 2  # the protocol's number


class Page:
    """One tab; a context manager that ends its browser."""

    def __init__(self, folder: Path, width: int = 1200, height: int = 1000) -> None:
        program = shutil.which('chromium') or pytest.fail(f'there is no chromium; install it: {INSTALL}')
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def connect() -> None:  # the protocol's pipe has the numbers 3 and 4
            first, second = os.dup(to_read), os.dup(to_write)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._process = subprocess.Popen([program, *FLAGS, f'--user-data-dir={folder / "profile"}', 'about:blank'],
                                         preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self._pending, self._count, self._session, self.events = b'', 0, None, []
        target = self._target()
        self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log'):
            self.call(f'{domain}.enable')
        self.resize(width, height)

    def __enter__(self) -> 'Page':
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def _target(self) -> str:
        for _ in range(200):
            for target in self.call('Target.getTargets')['targetInfos']:
                if target['type'] == 'page':
                    return target['targetId']
            time.sleep(0.05)
        raise AssertionError('no page')

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers; events on the way are kept in `events`."""
        self._count += 1
        message = {'id': self._count, 'method': method, 'params': parameters}
        if self._session is not None:
            message['sessionId'] = self._session
        os.write(self._write, json.dumps(message).encode() + b'\0')
        while True:
            while b'\0' not in self._pending:
                data = os.read(self._read, 1 << 20)
                assert data, 'the browser has ended'
                self._pending += data
            line, self._pending = self._pending.split(b'\0', 1)
            answer = json.loads(line)
            if answer.get('id') == self._count:
                assert 'error' not in answer, answer
                return answer['result']
            self.events.append(answer)

    def resize(self, width: int, height: int) -> None:
        """The size of the window in CSS pixels."""
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)

    def scheme(self, name: str) -> None:
        """'light' or 'dark'."""
        self.call('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': name}])

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in answer, answer
        return answer['result'].get('value')

    def open(self, address: str) -> None:
        """Go there, and wait for what the page fetches at its beginning."""
        self.call('Page.navigate', url=address)
        self.until("document.body && document.body.dataset.ready === 'yes'")

    def until(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        ends = time.monotonic() + seconds
        while not self.ask(condition):
            assert time.monotonic() < ends, f'never: {condition}'
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """The mouse, in the middle of an element."""
        self.ask(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        x, y = self.ask(f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                        " return [box.left + box.width / 2, box.top + box.height / 2]; })()")
        for kind in ('mousePressed', 'mouseReleased'):
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key of `KEYS`."""
        code, text = KEYS[key]
        named = {'key': key, 'windowsVirtualKeyCode': code, 'modifiers': modifiers}
        self.call('Input.dispatchKeyEvent', type='keyDown' if text else 'rawKeyDown', text=text, **named)
        self.call('Input.dispatchKeyEvent', type='keyUp', **named)

    def type(self, text: str) -> None:
        """Text where the focus is."""
        self.call('Input.insertText', text=text)

    def complaints(self) -> list[str]:
        """What the browser logged: scripts that fail, what the Content-Security-Policy blocked."""
        self.ask('0')
        return [json.dumps(event['params']) for event in self.events
                if event['method'] in ('Log.entryAdded', 'Runtime.exceptionThrown')]

    def picture(self, path: Path) -> None:
        """A PNG of the whole page."""
        shot = self.call('Page.captureScreenshot', captureBeyondViewport=True, format='png')
        path.write_bytes(base64.b64decode(shot['data']))
