"""HTTP for the page: who may ask, what is answered. Only this machine is served, and only the page's own requests.

A browser that was led here by another site is refused by its Host (a name that was bound to 127.0.0.1 afterwards, DNS
rebinding) or its Origin. The Content-Security-Policy lets the page run its own files and nothing else.
"""

import json
import select
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from core.common.errors import UserError, is_out_of_memory, out_of_memory
from core.sampling.replay import replay_file
from core.sampling.serving.queue import QueueFull
from core.sampling.serving.service import Job, Service

LARGEST_BODY = 65_536  # bytes of a request
PATIENCE = 30  # seconds for a request to arrive
SAFETY = {
    'Content-Security-Policy': "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                               "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                               "require-trusted-types-for 'script'",
    'X-Content-Type-Options': 'nosniff', 'Cross-Origin-Resource-Policy': 'same-origin',
    'Cross-Origin-Opener-Policy': 'same-origin', 'Referrer-Policy': 'no-referrer', 'Cache-Control': 'no-store'}
JSON = 'application/json'


def _own_file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding='utf-8')


PAGES: dict[str, tuple[Callable[[str], str], str, str]] = {  # path: reader, file, type
    '/': (_own_file, 'page.html', 'text/html; charset=utf-8'),
    '/serve.css': (_own_file, 'serve.css', 'text/css; charset=utf-8'),
    '/serve.js': (_own_file, 'serve.js', 'text/javascript; charset=utf-8'),
    '/style.css': (replay_file, 'style.css', 'text/css; charset=utf-8'),
    '/text.js': (replay_file, 'text.js', 'text/javascript; charset=utf-8')}


class Gone(Exception):
    """Nobody reads the answer any more."""


class Server(ThreadingHTTPServer):
    """Serves one model's page on the loopback address."""

    daemon_threads = True

    def __init__(self, port: int, service: Service) -> None:
        """Raises OSError where the port cannot be opened."""
        super().__init__(('127.0.0.1', port), Handler)
        self.service = service
        self.hosts = {f'{name}:{self.server_port}' for name in ('127.0.0.1', 'localhost')}
        if self.server_port == 80:
            self.hosts |= {'127.0.0.1', 'localhost'}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks off is no news; everything else is."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    server_version, sys_version = 'sample.py', ''
    timeout = PATIENCE
    error_content_type, error_message_format = 'text/plain; charset=utf-8', '%(code)d %(message)s\n'

    def do_GET(self) -> None:
        """The page, its files, what it offers, a finished run."""
        if not self._is_welcome(asks_to_write=False):
            return
        path = self.path.partition('?')[0]
        if path in PAGES:
            read, name, kind = PAGES[path]
            self._answer(HTTPStatus.OK, read(name).encode(), kind)
        elif path == '/offers':
            self._answer_json(HTTPStatus.OK, self.server.service.offers())
        elif path.count('/') == 3 and path.startswith('/runs/'):
            _, _, run, name = path.split('/')
            found = self.server.service.file(run, name)
            if found is None:
                self._refuse(HTTPStatus.NOT_FOUND, ['this run is no longer kept; write the text again'])
            else:
                self._answer(HTTPStatus.OK, *found, name)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, ['there is nothing at this address'])

    def do_POST(self) -> None:
        """A run, told step by step in lines of JSON."""
        if not self._is_welcome(asks_to_write=True):
            return
        if self.path != '/run':
            self._refuse(HTTPStatus.NOT_FOUND, ['there is nothing at this address'])
            return
        body = self._body()
        if body is None:
            return
        service = self.server.service
        try:
            job = service.prepare(body)
            with service.queue.place() as ticket:
                self._begin(HTTPStatus.OK, 'application/x-ndjson')
                service.queue.wait(ticket, lambda before: self._tell({'event': 'waiting', 'before': before}))
                self._run(job)
        except QueueFull as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, [str(error)])
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error).split('\n'))
        except Gone:
            pass

    def _run(self, job: Job) -> None:
        """The run, whose own problems come after the steps that went well."""
        try:
            self.server.service.run(job, self._tell)
        except UserError as error:
            self._tell({'event': 'problem', 'problems': str(error).split('\n')})
        except Gone:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                self._tell({'event': 'problem', 'problems': ['the run failed; the terminal says why']})
                raise
            self._tell({'event': 'problem', 'problems': [out_of_memory(error, ('length',))]})

    def _is_welcome(self, asks_to_write: bool) -> bool:
        """Whether the request comes from the page itself; where it does not, it has been refused."""
        hosts, origins = (self.headers.get_all(name, []) for name in ('Host', 'Origin'))
        site = self.headers.get('Sec-Fetch-Site', 'none')
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            self._refuse(HTTPStatus.FORBIDDEN, [f'only http://127.0.0.1:{self.server.server_port}/ is served'])
        elif any(origin.removeprefix('http://') not in self.server.hosts or not origin.startswith('http://')
                 for origin in origins) or (asks_to_write and not origins) or site not in ('none', 'same-origin'):
            self._refuse(HTTPStatus.FORBIDDEN, ['another site may not ask here'])
        elif asks_to_write and self.headers.get_content_type() != JSON:
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, [f'a request must be {JSON}'])
        else:
            return True
        return False

    def _body(self) -> bytes | None:
        """The whole body; None where it is refused."""
        length = self.headers.get('Content-Length', '')
        if not (length.isascii() and length.isdigit()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, ['a request must say its length'])
            return None
        if len(length) > 9 or int(length) > LARGEST_BODY:
            problem = f'the request has {length[:12]} bytes, but the page takes at most {LARGEST_BODY:,}; shorten the text'
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, [problem])
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self._refuse(HTTPStatus.BAD_REQUEST, ['the request broke off'])
            return None
        return body

    # Answers ----------------------------------------------------------------------------------------------------------

    def _tell(self, event: dict[str, Any]) -> None:
        """One line of a run; raises `Gone` where nobody listens, and where the program ends."""
        if self.server.service.queue.closed:
            raise Gone
        try:
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                raise Gone
            self.wfile.write(json.dumps(event, allow_nan=False, separators=(',', ':')).encode() + b'\n')
        except OSError as error:
            raise Gone from error

    def _begin(self, status: HTTPStatus, kind: str, length: int | None = None, attached: str | None = None) -> None:
        self.send_response(status)
        for name, value in SAFETY.items():
            self.send_header(name, value)
        self.send_header('Content-Type', kind)
        if length is not None:
            self.send_header('Content-Length', str(length))
        if attached is not None:
            self.send_header('Content-Disposition', f'attachment; filename="{attached}"')
        self.end_headers()

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, attached: str | None = None) -> None:
        self._begin(status, kind, len(body), attached)
        self.wfile.write(body)

    def _answer_json(self, status: HTTPStatus, data: dict[str, Any]) -> None:
        self._answer(status, json.dumps(data).encode(), JSON)

    def _refuse(self, status: HTTPStatus, problems: list[str]) -> None:
        self.close_connection = True
        self._answer_json(status, {'problems': problems})

    def log_message(self, format: str, *arguments: object) -> None:
        """No line for each request."""
