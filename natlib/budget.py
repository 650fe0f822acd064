"""What a derived network may cost."""

from __future__ import annotations

from dataclasses import dataclass

from natlib.cost import Cost, network_cost
from natlib.errors import NatlibError
from natlib.genotype import Genotype
from natlib.latency import latencies
from natlib.macro import Macro

_PASSES = 5


@dataclass(frozen=True)
class Budget:
    """Upper limits on a network's cost, each inclusive; None is no limit.

    ``params`` and ``madds`` are counts as in ``cost.network_cost``. ``latency_ms`` limits the
    median of a few passes of one image on this machine (``latency.latencies``): another machine, or
    another moment, may judge a network near the limit otherwise. Raises NatlibError on a limit
    that is not a number of 0 or above. Source: the constraint c(α) <= κ of NAT, Eq. 2.
    """

    params: int | None = None
    madds: int | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("params", "madds", "latency_ms"):
            limit = getattr(self, name)
            if limit is not None and not (isinstance(limit, int | float) and limit >= 0):
                raise NatlibError(f"{name} = {limit!r}; a limit is a number of at least 0, or None")

    @staticmethod
    def of(cost: Cost) -> Budget:
        """The budget that allows as many params and MAdds as ``cost``."""
        return Budget(cost.params, cost.madds)

    def allows(self, genotype: Genotype, macro: Macro) -> bool:
        """Say whether the standalone network keeps to all limits; latency is measured last."""
        cost = network_cost(genotype, macro)
        if self.params is not None and cost.params > self.params:
            return False
        if self.madds is not None and cost.madds > self.madds:
            return False
        if self.latency_ms is None:
            return True
        return latencies({"": (genotype, macro)}, 1, _PASSES)[""] <= self.latency_ms
