"""What is granted between two turns of the books, as far as it needs no decision.

A till is open only while `Books.settle` has nothing to do, and what it does leaves that so: it grants what is
above the upper mark, and takes back. The ledger of a device is exact at every moment, for its till grants out
of it. What the books write down beside, who was granted what and when, they are told of by notes, before
anything else in their next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import NamedTuple

from torch_elastic_mem.broker.books import Books
from torch_elastic_mem.broker.grace import Grace
from torch_elastic_mem.broker.protocol import Report


class Notes(NamedTuple):
    """What tills have done.

    Attributes:
        grants: nanoseconds of the monotonic clock, books, account and bytes of each, in order.
        reports: books, and what was said to them; the last of each account.
    """

    grants: list[tuple[int, Books, int, int]]
    reports: list[tuple[Books, Report]]


class Tills:
    """The tills of all devices.

    Not thread-safe: what touches a till is called in the books' turn, so all but `write`.

    Args:
        books: of every device.
        grace: in which nothing is granted.
        clock: seconds, monotonic.
    """

    def __init__(self, books: Mapping[str, Books], grace: Grace, clock: Callable[[], float]) -> None:
        self._books = books
        self._grace = grace
        self._clock = clock

    def notes(self) -> Notes:
        """What has been done since the last call."""
        taken = Notes([], [])
        for books in self._books.values():
            grants, reports = books.accounts.till.take_notes()
            taken.grants.extend((at, books, account, bytes) for account, bytes, at in grants)
            taken.reports.extend((books, Report(*report)) for report in reports)
        taken.grants.sort(key=itemgetter(0))
        return taken

    @staticmethod
    def write(notes: Notes) -> None:
        """Writes it down."""
        for at, books, account, bytes in notes.grants:
            books.demands.note(books.accounts.holders[account], bytes, at / 1e9, at / 1e9)
        for books, report in notes.reports:
            books.accounts.holders[report.account].report(report)

    def open(self) -> None:
        """At the end of a turn: opens each till at which nothing needs a decision, and closes the others."""
        granting = self._clock() >= self._grace.until
        # Seldom is there one. A debt on one device counts on all on which the process has accounts.
        debtors = any(books.asks.late for books in self._books.values())
        for books in self._books.values():
            accounts = books.accounts
            if granting and books.calm and not (debtors and accounts.owing):
                accounts.till.open(accounts.above_low)
            else:
                accounts.till.close()
