"""One run at a time, the others in the order in which they came, no more than a few."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from core.common.errors import UserError

LONGEST = 4  # runs that wait, besides the one that goes on
SECONDS = 0.5  # between two looks at whether somebody still waits


class QueueFull(UserError):
    """Too many runs wait."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """A place in the queue, and the thread that has it."""

    thread: threading.Thread


class Queue:
    """Who is served, and who waits; closed: nobody is let in any more, and whoever is served is to end."""

    def __init__(self, longest: int = LONGEST, seconds: float = SECONDS) -> None:
        self._longest, self._seconds = longest, seconds
        self._changed = threading.Condition()
        self._tickets: list[Ticket] = []
        self.closed = False

    @contextmanager
    def place(self) -> Iterator[Ticket]:
        """A ticket, given back in the end; raises `QueueFull`."""
        ticket = Ticket(threading.current_thread())
        with self._changed:
            if self.closed:
                raise QueueFull('the program ends')
            if len(self._tickets) > self._longest:
                raise QueueFull(f'{self._longest} runs wait already, the most there may be; try again later')
            self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def close(self) -> None:
        """Return when the threads of all who are here have ended: one that computes while the process ends would abort
        it. Whoever is served must look at `closed`."""
        with self._changed:
            self.closed = True
            threads = [ticket.thread for ticket in self._tickets]
        for thread in threads:
            thread.join()

    def wait(self, ticket: Ticket, tell: Callable[[int], None]) -> None:
        """Return when it is the ticket's turn; until then `tell` hears often how many are before it, and may raise."""
        while True:
            with self._changed:
                before = self._tickets.index(ticket)
            if before == 0:
                return
            tell(before)
            with self._changed:
                if self._tickets.index(ticket):
                    self._changed.wait(self._seconds)
