from __future__ import annotations

import pytest
from standin import StandIn, names, texts

from clara_fast.store import MemoryStore


@pytest.fixture
def model() -> StandIn:
    return StandIn()


@pytest.fixture
def filled(tmp_path, model):
    """A store of 10 documents in shards of 4, 4 and 2, closed."""
    with MemoryStore.create(tmp_path / "store", model) as store:
        for start, count in ((0, 4), (4, 4), (8, 2)):
            documents = texts(count, start)
            store.add(names(count, start), documents, model.compress(documents))
    return MemoryStore.open(tmp_path / "store", model)
