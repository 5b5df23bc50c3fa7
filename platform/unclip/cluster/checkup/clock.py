"""Clocks: how far each node's is from the driver's, from the midpoint of a round trip."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from unclip.cluster.checkup.nodes import Place, Probes, Silence
from unclip.cluster.checkup.result import Finding, failed, ok

EXCHANGES = 5
MOST_S = 1.0
"""A node's notice that it will go, and the signatures of object stores, carry times; seconds of a notice are what is left to
save in."""


@dataclass(frozen=True)
class Exchange:
    """Seconds since 1970: by the driver's clock before and after, by the node's between."""

    sent: float
    remote: float
    received: float

    @property
    def uncertainty_s(self) -> float:
        """Half the round trip: the answer was given at any time within it."""
        return (self.received - self.sent) / 2

    @property
    def offset_s(self) -> float:
        """How far the node's clock is ahead, to within the uncertainty."""
        return self.remote - (self.sent + self.received) / 2


def exchange(probes: Probes, place: Place) -> list[Exchange] | Silence:
    """Round trips to the node, one after the other."""
    found = []
    for _ in range(EXCHANGES):
        sent = time.time()
        remote = probes.ask_one(place, time.time)
        if isinstance(remote, Silence):
            return remote
        found.append(Exchange(sent, remote, time.time()))
    return found


def judge_clock(exchanges: Sequence[Exchange]) -> Finding:
    """By the shortest round trip. What the uncertainty leaves open is no failure."""
    best = min(exchanges, key=lambda one: one.uncertainty_s)
    found = f"{best.offset_s * 1000:+.1f} ms from the driver's clock, to within {best.uncertainty_s * 1000:.1f} ms"
    if abs(best.offset_s) - best.uncertainty_s > MOST_S:
        return failed(found, f"let the hosts keep time (chrony, ntpd); more than {MOST_S:g} s apart is too much")
    return ok(found)
