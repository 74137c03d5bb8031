"""Many requests, one model: takes them in, steps, hands out what comes of them.

Whoever waits for a request drives the engine: the first of several threads takes a step for all of them while the others wait
for the turn. For callers that cannot wait, a server or a coroutine, a thread drives it (`start`).
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dsv3.engine.blocks import BlockPool
from dsv3.engine.cache import PagedCache
from dsv3.engine.options import MAX_BATCH
from dsv3.engine.request import Request, Status
from dsv3.engine.runner import Runner
from dsv3.engine.scheduler import Scheduler
from dsv3.errors import Dsv3Error, UsageError

if TYPE_CHECKING:
    from dsv3.engine.executor import Executor

PREFILL_TOKENS = 2048  # of a step
BESIDE_TOKENS = 256  # of prompts in a step that others wait for
_LOOK = 0.005  # seconds between two looks at what another thread's steps have brought
Listener = Callable[[Request, str], None]


class Backlog(NamedTuple):
    """Requests, and tokens of theirs."""

    requests: int
    tokens: int


class Engine:
    """cache_tokens: room in the cache, in tokens; None: as much as the requests at hand need, growing. Others: see
    `Scheduler`. Every method may be called from any thread."""

    def __init__(
        self,
        model: Executor,
        cache_tokens: int | None = None,
        budget: int = PREFILL_TOKENS,
        beside: int = BESIDE_TOKENS,
        most: int = MAX_BATCH,
    ) -> None:
        self._runner, self._fixed = Runner(model), cache_tokens is not None
        size = model.page_size
        pages = -(-(cache_tokens or 1) // size)
        self.cache: PagedCache = model.paged_cache(pages)
        self.pool = BlockPool(pages, size)
        self.scheduler = Scheduler(self.pool, budget, beside, most)
        self.steps = 0
        self._turn = threading.Lock()  # held while a step is taken
        self._inbox: list[Request] = []
        self._aborted: list[tuple[Request, BaseException | None]] = []
        self._listeners: dict[Request, Listener] = {}
        self._mail = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    # -- what callers do

    def submit(self, requests: Iterable[Request], listener: Listener | None = None) -> None:
        """Take requests in. listener(request, text): called in the thread that steps, with new text, and when the request is
        done. UsageError if one can never fit."""
        wanted = list(requests)
        for r in wanted:
            need = self.pool.blocks_for(r.longest)
            if self._fixed and need > self.pool.total:
                raise UsageError(
                    f"{len(r.prompt)} tokens and {r.limit} more need {need} blocks of cache; there are {self.pool.total}: "
                    "ask for fewer tokens, or give the cache more"
                )
        with self._mail:
            if self._closing:
                raise Dsv3Error("the engine is closed")
            for r in wanted:
                if listener is not None:
                    self._listeners[r] = listener
                if not r.done:
                    self._inbox.append(r)
            self._mail.notify_all()
        for r in wanted:
            if r.done:
                self._tell(r, "".join(r.pieces))

    def abort(self, requests: Iterable[Request], error: BaseException | None = None) -> None:
        """End requests; their blocks are free at the latest after the step that is being taken."""
        with self._mail:
            self._aborted += [(r, error) for r in requests]
            self._mail.notify_all()
        self._settle()

    def drive(self, requests: Sequence[Request]) -> Iterator[None]:
        """Step until these are done, or let others step; yields after each step. Leaving it early aborts them."""
        try:
            while any(not r.done for r in requests):
                if self._turn.acquire(timeout=_LOOK):
                    try:
                        if any(not r.done for r in requests):
                            self.step()
                    finally:
                        self._turn.release()
                    self._settle()
                yield
        finally:
            self.abort([r for r in requests if not r.done])

    def step(self) -> bool:
        """One step for all; False where there was nothing to do. For who holds the turn."""
        self._take_in()
        plan = self.scheduler.schedule()
        if not plan:
            return False
        self.steps += 1
        for work in plan:
            r = work.request
            self.cache.pages[r.row] = r.blocks
            r.prefilled = r.prefilled or time.perf_counter()
        try:
            done = self._runner.run(self.cache, plan)
        except (Exception, SystemExit) as error:
            for work in plan:
                self._end(work.request, error)
            return True
        for choice in done.choices:
            r = choice.work.request
            if choice.error is not None:
                self._end(r, choice.error)
                continue
            r.prompt_logprobs += choice.prompt
            try:
                text = self.scheduler.commit(choice.work, choice.tokens, choice.logprobs)
            except Exception as error:  # a grammar or a text that fails is the request's own
                self._end(r, error)
                continue
            if text or r.done:
                self._tell(r, text)
        try:
            self._runner.draft(self.cache, done)
        except (Exception, SystemExit) as error:
            for work in plan:
                if work.request.drafting:
                    self._end(work.request, error)
        return True

    def reserve(self, lengths: Iterable[int]) -> None:
        """Have room for sequences of these lengths, unless the cache's size was given."""
        pages = sum(self.pool.blocks_for(n) for n in lengths)
        if not self._fixed and pages > self.pool.total:
            # Up to a fourth more, so that a slightly longer text is no reason to copy all of it again.
            step = 1 << max(0, pages.bit_length() - 3)
            pages = -(-pages // step) * step
            self.cache.grow(pages)
            self.pool.grow(pages)

    # -- the thread that drives it

    def start(self) -> None:
        """Have a thread drive it, until `close`."""
        with self._mail:
            if self._closing or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._run, name="dsv3-engine", daemon=True)
            self._thread.start()
            _started.add(self)

    def _run(self) -> None:
        while True:
            with self._mail:
                while not self._closing and not self._inbox and not self._aborted and self.scheduler.idle:
                    self._mail.wait()
                if self._closing:
                    return
            try:
                with self._turn:
                    self.step()
            except BaseException as error:
                self._break(error)
                raise

    def _break(self, error: BaseException) -> None:
        """After a fault of the engine itself nothing is known to be right: everybody is told, and nothing is taken in."""
        with self._mail:
            self._closing = True
            self._inbox, left = [], self._inbox
        for r in (*self.scheduler.running, *self.scheduler.waiting, *left):
            r.status, r.error = Status.ABORTED, error
            self._tell(r, "")

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """End all requests and the thread; nothing is taken in any more."""
        with self._mail:
            self._closing = True
            self._mail.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._turn:
            self._take_in()
            for r in (*self.scheduler.running, *self.scheduler.waiting):
                self._end(r, Dsv3Error("the engine was closed"))

    def _settle(self) -> None:
        """Take in what was aborted, unless somebody who will has the turn. It may be the caller himself: abandoned generators
        are closed wherever the collector runs."""
        while self._aborted and self._thread is None and self._turn.acquire(blocking=False):
            try:
                self._take_in()
            finally:
                self._turn.release()

    # -- inside, for who holds the turn

    def _take_in(self) -> None:
        with self._mail:
            new, self._inbox = self._inbox, []
            aborted, self._aborted = self._aborted, []
        for r in new:
            self.scheduler.add(r)
        if new:
            known = [*self.scheduler.running, *self.scheduler.waiting]
            self.reserve(sorted((r.longest for r in known), reverse=True)[: self.scheduler.most])
        for r, error in aborted:
            self._end(r, error)

    def _end(self, r: Request, error: BaseException | None) -> None:
        if r.done:
            return
        self.scheduler.abort(r, error)
        self._tell(r, "")

    def _tell(self, r: Request, text: str) -> None:
        listener = self._listeners.pop(r, None) if r.done else self._listeners.get(r)
        if listener is not None:
            listener(r, text)

    def check(self) -> None:
        """AssertionError unless the books balance, see `Scheduler.check`."""
        self.scheduler.check()

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self.scheduler.running)

    def backlog(self) -> Backlog:
        """What waits for its first step."""
        with self._mail:
            waiting = [*self._inbox, *list(self.scheduler.waiting)]
        return Backlog(len(waiting), sum(len(r.tokens) for r in waiting))

    @property
    def idle(self) -> bool:
        return self.scheduler.idle and not self._inbox


_started: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    """Before the interpreter goes: a thread that is within a kernel then would bring it down."""
    for engine in list(_started):
        engine.close()


def failed(requests: Iterable[Request]) -> BaseException | None:
    """Why the first of these failed; None if none did."""
    return next((r.error for r in requests if r.status is Status.ABORTED and r.error is not None), None)
