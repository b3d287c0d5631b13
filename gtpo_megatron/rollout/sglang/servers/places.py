"""Places on the servers that may be sampled from: the least loaded is found without looking at all of them."""

from gtpo_megatron.rollout.sglang.servers.states import Worker

AFFINITY = 8  # completions of a group stay together, for the prefix cache, up to this much imbalance


class Places:
    """`limit` places on each of the open workers, `total` in all. Every call costs the same for any number of workers."""

    def __init__(self, limit: int, total: int) -> None:
        self._limit, self._total = limit, total
        self._taken = 0  # of closed workers as well
        # open workers by load, those that have had it longest first; `_least` is no more than the smallest load
        self._by_load: list[dict[Worker, None]] = [{} for _ in range(limit + 1)]
        self._least = 0

    def open(self, worker: Worker) -> None:
        """From now on there are places on it. What it holds already counts."""
        load = self._load(worker)
        self._by_load[load][worker] = None
        self._least = min(self._least, load)

    def close(self, worker: Worker) -> None:
        """No more places on it, if there were; those that are taken are given back all the same."""
        self._by_load[self._load(worker)].pop(worker, None)

    def take(self, preferred: Worker | None) -> Worker | None:
        """A place on the least loaded worker, or on the preferred one up to AFFINITY more; None where there is none."""
        while self._least < self._limit and not self._by_load[self._least]:
            self._least += 1
        if self._least == self._limit or self._taken >= self._total:
            return None
        worker = next(iter(self._by_load[self._least]))
        if preferred is not None and self._may_stay(preferred):
            worker = preferred
        self._change(worker, 1)
        return worker

    def give_back(self, worker: Worker) -> None:
        """A place is free again."""
        self._change(worker, -1)

    def _may_stay(self, worker: Worker) -> bool:
        load = self._load(worker)
        return load < self._limit and load <= self._least + AFFINITY and worker in self._by_load[load]

    def _change(self, worker: Worker, by: int) -> None:
        self._taken += by
        is_open = worker in self._by_load[self._load(worker)]
        self.close(worker)
        worker.inflight += by
        if is_open:
            self.open(worker)

    def _load(self, worker: Worker) -> int:
        return min(worker.inflight, self._limit)
