"""A page on this machine that writes texts: `sample.py --serve=True`.

    requests.py  what the page may ask for, and the options that this makes
    queue.py     one run at a time, a bounded number waiting
    service.py   the model, loaded once; a run told step by step; the last finished runs
    server.py    HTTP: who may ask, what is answered
    page.html, serve.css, serve.js: the page, which also reads style.css and text.js of core/sampling/replay
"""

from collections.abc import Callable, Mapping

from core.common.errors import UserError, raise_problems
from core.common.printing import say
from core.sampling.options import SampleConfig
from core.sampling.policy_options import option_problems
from core.sampling.serving.requests import serving_problems
from core.sampling.serving.server import Server
from core.sampling.serving.service import Service


def serve(config: SampleConfig, explicit: Mapping[str, str], say: Callable[[str], None] = say) -> None:
    """Load the model and answer the page until Ctrl-C; UserError where the options or the port do not suit."""
    raise_problems([*option_problems(config, explicit), *serving_problems(explicit)])
    service = Service(config, explicit)
    for line in service.said:
        say(line)
    try:
        server = Server(config.port, service)
    except OSError as error:
        raise UserError(f'port is {config.port}, but it cannot be opened ({error.strerror}); take another, such as '
                        f'--port={config.port % 65535 + 1}, or --port=0 for a free one') from error
    with server:
        say(f'open http://127.0.0.1:{server.server_port}/ in a browser; Ctrl-C ends it')
        try:
            server.serve_forever()
        finally:
            service.queue.close()
