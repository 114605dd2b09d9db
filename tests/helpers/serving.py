"""The server of sample.py --serve=True in this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configurator import configure
from core.sampling.options import SampleConfig
from core.sampling.serving.server import Server
from core.sampling.serving.service import Service


def settings(folder: Path, *arguments: str) -> tuple[SampleConfig, dict[str, str]]:
    """Options of sample.py, and which were given."""
    configuration = configure(SampleConfig, [f'--out_dir={folder}', '--device=cpu', *arguments])
    return configuration.config, configuration.explicit


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[Server]:
    """A server on a free port, with the checkpoint of a folder."""
    server = Server(0, Service(*settings(folder, *arguments)))
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
