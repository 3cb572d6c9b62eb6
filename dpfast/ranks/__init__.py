"""Several processes that train one model: torch.distributed, replicas or ``fully_shard``.

    Ranks         who takes part, and what they tell each other
    gathered      the whole parameters of a model that ``fully_shard`` has cut, for one step
    share         this rank's part of a Poisson sample that all ranks draw together
    open_ledger   the ledger on disk, kept by rank 0 and obeyed by all

Guarantee: with R ranks a step is what it is with one. Each example is on one rank, which clips it by itself. The
clipped sums of all ranks are added up once for each logical batch. Each number of the total gets its noise once, from
one rank, with a key of that rank's operating system that no other rank knows. The step is charged before that, by rank
0, and no rank goes on before it is.
"""

from dpfast.ranks.ledger import RankLedger, open_ledger
from dpfast.ranks.shards import gathered
from dpfast.ranks.team import Ranks, share

__all__ = ["RankLedger", "Ranks", "gathered", "open_ledger", "share"]
