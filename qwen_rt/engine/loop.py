"""Loop: shares one engine among callers and threads; whoever wants the next output makes the next step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen_rt.engine.engine import Engine
from qwen_rt.engine.sequence import Output, Request


class Loop:
    """An engine behind a lock. Requests of all callers run in the same steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._inboxes: dict[int, deque[Output | Exception]] = {}
        self._abandoned: deque[int] = deque()

    def submit(self, requests: Sequence[Request]) -> Job:
        """Queue requests, all or none; RequestError says which cannot be served."""
        with self._lock:
            for request in requests:
                self.engine.check(request)
            job = Job(self, requests)
            for request in requests:
                self._inboxes[self.engine.add(request)] = job.inbox
        return job

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Engine.logits, between two steps."""
        with self._lock:
            self._settle()
            return self.engine.logits(ids)

    def step_for(self, job: Job) -> None:
        """Make steps until `job` has an output."""
        while not job.inbox:
            with self._lock:
                self._settle()
                if not job.inbox:
                    self._step()

    def abandon(self, ids: Sequence[int]) -> None:
        """Abort requests. Never blocks: it may run inside a garbage collection that interrupted a step."""
        self._abandoned.extend(ids)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        while self._abandoned:
            request_id = self._abandoned.popleft()
            self._inboxes.pop(request_id, None)
            self.engine.abort(request_id)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            # The engine has aborted the requests of the failed step; each of their callers gets the error.
            for request_id in [i for i in self._inboxes if not self.engine.is_unfinished(i)]:
                self._inboxes.pop(request_id).append(error)
            return
        finished = set()
        for out in outputs:
            self._inboxes[out.request_id].append(out)
            if out.finish_reason is not None:
                finished.add(out.request_id)
        for request_id in finished:
            if not self.engine.is_unfinished(request_id):
                del self._inboxes[request_id]


class Job:
    """Iterates over the outputs of some requests until all have finished; dropping or closing it aborts the rest."""

    def __init__(self, loop: Loop, requests: Sequence[Request]) -> None:
        """Made by Loop.submit."""
        self.inbox: deque[Output | Exception] = deque()
        self._loop = loop
        self._ids = [request.id for request in requests]
        self._left = sum(request.params.n for request in requests)

    def __iter__(self) -> Iterator[Output]:
        return self

    def __next__(self) -> Output:
        if not self._left:
            raise StopIteration
        try:
            if not self.inbox:
                self._loop.step_for(self)
            item = self.inbox.popleft()
            if isinstance(item, Exception):
                raise item
        except BaseException:
            self.close()
            raise
        self._left -= item.finish_reason is not None
        return item

    def close(self) -> None:
        """Abort what has not finished and free its blocks."""
        if self._left:
            self._left = 0
            self._loop.abandon(self._ids)

    def __del__(self) -> None:
        self.close()
