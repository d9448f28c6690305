"""Holding a store against its manifest, byte by byte."""

from __future__ import annotations

import numpy as np

from clara_fast.store.errors import listing
from clara_fast.store.ids import Ids
from clara_fast.store.shard import Shard
from clara_fast.store.snapshot import Snapshot


def problems_of(snapshot: Snapshot) -> tuple[list[str], list[str]]:
    """A line for everything that is wrong, and the names of the shards that it is wrong with."""
    problems: list[str] = []
    damaged: list[str] = []
    sound: list[Shard] = []
    for shard in snapshot.shards:
        if found := shard.problems():
            problems += found
            damaged.append(shard.entry.name)
        else:
            sound.append(shard)
    starts = np.cumsum([0, *(shard.entry.live for shard in sound)])
    repeated = np.sort(Ids(sound).repeated())
    owners = np.searchsorted(starts, repeated, side="right") - 1
    for number in np.unique(owners).tolist():
        shard = sound[number]
        rows = shard.row_of_live(repeated[owners == number] - starts[number])
        names = shard.ids()
        twice = [names[row] for row in rows.tolist()]
        problems.append(f"{snapshot.path}: shard {shard.entry.name} repeats the ids {listing(twice)}")
        damaged.append(shard.entry.name)
    return problems, damaged
