"""The ledger of several ranks: rank 0 keeps it, and no rank takes a step that is not in it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dpfast.errors import LedgerError
from dpfast.privacy import Ledger, Plan
from dpfast.ranks.team import Ranks, digest


class RankLedger:
    """What ``DPOptimizer`` asks of a ledger, on every rank. Making one is a collective.

    ledger: on rank 0 the one that counts; elsewhere one in memory, which follows it.

    Guarantee: when ``charge`` returns on any rank, the step is spent in the ledger of rank 0.

    Raises ConfigError on every rank when their plans differ, and LedgerError when a rank has taken steps that rank 0
    has not.
    """

    def __init__(self, ledger: Ledger, ranks: Ranks) -> None:
        self.ledger, self.ranks = ledger, ranks
        ranks.alike("plan", ledger.plan.fingerprint(), "Make it of the same values on all ranks")
        charged = ranks.first(lambda: ledger.charged_steps)
        ahead = ledger.charged_steps - charged
        ranks.agree(LedgerError(f"this rank has taken {ahead} steps that rank 0 has not") if ahead > 0 else None)
        if not ranks.leads:
            for step in range(ledger.charged_steps + 1, charged + 1):
                ledger.charge(step)

    @property
    def plan(self) -> Plan:
        """As ``Ledger`` has it."""
        return self.ledger.plan

    @property
    def charged_steps(self) -> int:
        """As ``Ledger`` has it."""
        return self.ledger.charged_steps

    def charge(self, step: int) -> None:
        """As ``Ledger`` has it; what it raises on rank 0 it raises on every rank."""
        charged = self.ranks.first(lambda: self._charge(step))
        if not self.ranks.leads:
            if charged != step:
                raise LedgerError(f"rank 0 has charged step {charged}, this rank expected {step}: they are not in step")
            self.ledger.charge(step)

    def _charge(self, step: int) -> int:
        self.ledger.charge(step)
        return step


def kept_by_first(ranks: Ranks, make: Callable[[], Ledger], plan: Plan) -> Ledger:
    """What ``make()`` opens on rank 0; elsewhere a ledger in memory, which is to follow it.

    Raises ConfigError where other ranks do not see the file: another rank 0, after a restart, would begin it anew.
    """
    made: list[Ledger] = []
    ranks.first(lambda: made.append(make()))
    path = ranks.first(lambda: made[0].path)
    if path is not None and ranks.size > 1:
        content = path.read_bytes() if path.exists() else b"there is none"
        cure = f"Name a place for {path.name} on a file system that all ranks share"
        ranks.alike("the ledger's file", digest([content]), cure)
    return made[0] if made else Ledger(None, plan)


@contextmanager
def open_ledger(path: str | os.PathLike[str], plan: Plan, ranks: Ranks | None = None) -> Iterator[Ledger | RankLedger]:
    """The ledger at ``path`` (``Ledger``), which rank 0 alone opens and locks. For ``DPOptimizer``, on every rank."""
    ranks = ranks or Ranks.current()
    with kept_by_first(ranks, lambda: Ledger(path, plan), plan) as ledger:
        yield ledger if ranks.size == 1 else RankLedger(ledger, ranks)
