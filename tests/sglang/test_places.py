"""Places on servers: always the least loaded, as a search through all of them would find it, in no more time."""

import random
import time

import pytest

from gtpo_megatron.rollout.sglang.servers.places import AFFINITY, Places
from gtpo_megatron.rollout.sglang.servers.states import Worker

LIMIT, TOTAL = 6, 25  # less than all of five workers


def workers_of(count: int) -> list[Worker]:
    return [Worker(index, f"http://a:{index}", owned=False) for index in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_a_place_is_on_the_least_loaded_that_is_open(seed: int) -> None:
    """Against a search through all workers, over random takes, returns, openings and closings."""
    chance = random.Random(seed)
    places, workers = Places(LIMIT, TOTAL), workers_of(5)
    opened: set[Worker] = set()
    taken: list[Worker] = []
    for _ in range(2000):
        worker = chance.choice(workers)
        kind = chance.random()
        if kind < 0.5:
            preferred = worker if chance.random() < 0.3 else None
            free = [w.inflight for w in opened if w.inflight < LIMIT]
            before = {w: w.inflight for w in workers}
            found = places.take(preferred)
            assert (found is None) == (not free or len(taken) == TOTAL)
            if found is None:
                continue
            taken.append(found)
            stays = preferred in opened and before[preferred] < min(LIMIT, min(free) + AFFINITY + 1)
            assert found is preferred if stays else before[found] == min(free)
            assert found in opened and found.inflight == before[found] + 1
        elif kind < 0.85 and taken:
            places.give_back(taken.pop(chance.randrange(len(taken))))
        elif worker in opened:
            places.close(worker)
            opened.remove(worker)
        else:
            places.open(worker)
            opened.add(worker)
    assert [w.inflight for w in workers] == [taken.count(w) for w in workers]


def test_a_group_stays_up_to_an_imbalance_and_places_are_spread_evenly() -> None:
    places, workers = Places(100, 1000), workers_of(3)
    for worker in workers:
        places.open(worker)
    stayed = [places.take(workers[2]) for _ in range(AFFINITY + 1)]
    assert stayed == [workers[2]] * (AFFINITY + 1)
    assert places.take(workers[2]) in workers[:2]
    for _ in range(100):
        places.take(None)
    loads = [worker.inflight for worker in workers]
    assert max(loads) - min(loads) <= 1


def test_a_thousand_servers_cost_no_more_than_ten() -> None:
    def seconds(count: int) -> float:
        places, workers = Places(64, 10_000_000), workers_of(count)
        for worker in workers:
            places.open(worker)
        held = [places.take(None) for _ in range(count * 32)]
        begun = time.process_time()
        for number in range(6000):
            places.give_back(held[number % len(held)])
            held[number % len(held)] = places.take(None)
        return time.process_time() - begun

    assert min(seconds(1000) for _ in range(3)) < 10 * min(seconds(10) for _ in range(3))
