"""The steps of all plans of one engine, and the epsilon of releasing everything that they trained."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpfast.errors import CheckpointError, ConfigError
from dpfast.privacy import Ledger, Plan, accounting

NAMES = ("prv", "rdp", "gdp", "pld")


@dataclass
class _Part:
    """Steps of one plan: those of its ledger, or those that a checkpoint tells of."""

    id: str
    plan: Plan
    ledger: Ledger | None
    steps: int = 0
    path: str | os.PathLike[str] | None = None  # of the ledger's file, which rank 0 has open

    @property
    def charged(self) -> int:
        return self.steps if self.ledger is None else self.ledger.charged_steps

    @property
    def place(self) -> str | None:
        """Of the ledger's file."""
        return None if self.path is None else str(Path(self.path).resolve())


class Accountant:
    """Accounts with privacy loss distributions (dp-accounting), whose epsilon is an upper bound.

    Where Opacus' ``PRVAccountant`` estimates, this agrees with it to 1%; ``RDPAccountant`` says more.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []

    @staticmethod
    def mechanism() -> str:
        """How it accounts."""
        return "pld"

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """(noise multiplier, sample rate, steps charged) of each plan."""
        return [(part.plan.noise_multiplier, part.plan.sample_rate, part.charged) for part in self._parts]

    def __len__(self) -> int:
        """Steps charged."""
        return sum(part.charged for part in self._parts)

    def get_epsilon(self, delta: float) -> float:
        """Epsilon at ``delta`` of the steps charged so far; ``inf`` if some were without noise."""
        if not 0 < delta < 1:
            raise ConfigError(f"get_epsilon: delta={delta!r}, expected a number between 0 and 1, such as 1e-5")
        taken = tuple(part.plan.mechanism(part.charged) for part in self._parts if part.charged)
        return accounting.composed_epsilon(taken, delta) if taken else 0.0

    def begin(self, plan: Plan, ledger: Ledger, path: str | os.PathLike[str] | None = None) -> None:
        """Count the steps of ``ledger``, too, which is kept in the file ``path`` or in memory."""
        self._parts.append(_Part(secrets.token_hex(8), plan, ledger, path=path))

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for ``load_state_dict``."""
        parts = [
            {"id": part.id, "plan": part.plan.to_dict(), "steps": part.charged, "ledger": part.place}
            for part in self._parts
        ]
        return {"mechanism": self.mechanism(), "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count what the state tells of, too. Nothing that is counted now is forgotten: where both know of the same
        steps, the larger number stays; the last plan, if it is the state's own, goes on after the state's steps.
        """
        if not isinstance(state, Mapping) or state.get("mechanism") != self.mechanism() or "parts" not in state:
            raise CheckpointError(
                "accountant: expected the state of a dpfast accountant, got another (of Opacus, perhaps, whose steps"
                " cannot be taken over)"
            )
        for saved in state["parts"]:
            plan, steps = Plan.from_dict(saved["plan"]), int(saved["steps"])
            mine = self._same(saved, plan)
            if mine is None:
                self._parts.insert(0, _Part(saved["id"], plan, None, steps))
                continue
            mine.id = saved["id"]
            mine.steps = max(mine.steps, steps)
            while mine.ledger is not None and mine.ledger.charged_steps < steps:
                mine.ledger.charge(mine.ledger.charged_steps + 1)

    def _same(self, saved: Mapping[str, Any], plan: Plan) -> _Part | None:
        """Which of the parts goes on where a saved one ended: the same one, the one with the same file, or the last if
        it has not begun.
        """
        of_plan = [part for part in self._parts if part.plan.fingerprint() == plan.fingerprint()]
        for part in of_plan:
            if part.id == saved["id"] or (part.place is not None and part.place == saved["ledger"]):
                return part
        last = self._parts[-1] if self._parts else None
        return last if last in of_plan and last is not None and last.ledger is not None and not last.charged else None
