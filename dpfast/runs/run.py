"""What every stage of a run works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from dpfast.data import ImageSet
from dpfast.privacy.plan import Plan
from dpfast.ranks import Ranks
from dpfast.recipes import fingerprint
from dpfast.recipes.schema import Recipe
from dpfast.runs import build
from dpfast.runs.directory import RunDirectory
from dpfast.runs.stages import Stage


@dataclass(frozen=True)
class Run:
    """A checked recipe, the folder it is carried out in, and its stages by name, in their order.

    ranks: the processes that carry it out together; rank 0 alone writes to the folder, but for shards of samples and
    what ``evaluation`` keeps.
    """

    recipe: Recipe
    directory: RunDirectory
    plan: Plan
    private: ImageSet
    stages: dict[str, Stage]
    ranks: Ranks = field(default_factory=Ranks.alone)

    @cached_property
    def baseline_plan(self) -> Plan:
        """The privacy of the baseline classifier."""
        return build.baseline_plan(self.recipe, len(self.private))

    @property
    def fingerprint(self) -> str:
        """Of everything that the release depends on, the private images included."""
        return fingerprint(self.stages["sample"].parts)
