"""Threads that run kernels together: all the work once, from sleep too, in a forked process, from several threads of Python."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from dsv3_cpu import team
from dsv3_cpu.kernels.atoms import take, wait_for_all
from dsv3_cpu.programs import Kernel


def _mark(team, me, crew, done, who, rounds):
    """done[r, i] += 1 for every i in every round, rounds one after another: who[r] counts the threads that were there."""
    for r in range(rounds):
        p = take(team, r)
        while p < done.shape[1]:
            done[r, p] += 1 if r == 0 or done[r - 1, done.shape[1] - 1 - p] == 1 else 100
            p = take(team, r)
        who[r, me] += 1
        wait_for_all(team, crew)


mark = Kernel("test_team.mark", _mark)


def _run(rounds: int = 5, size: int = 1000) -> np.ndarray:
    done, who = np.zeros((rounds, size), np.int64), np.zeros((rounds, 8), np.int64)
    mark(1 << 30, done, who, rounds)
    assert (done == 1).all(), "every piece of every round once, and no round before the one before it was over"
    return who


@pytest.fixture(params=[1, 2, 3])
def crew(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_piece_is_done_once(crew: int) -> None:
    for _ in range(200):
        who = _run()
        assert (who[:, :crew] == 1).all() and not who[:, crew:].any()


def test_workers_sleep_and_wake(crew: int) -> None:
    for pause in (0.0, 0.001, 0.05, 0.3, 0.001):
        time.sleep(pause)
        _run()


def test_idle_workers_cost_nothing() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    _run()
    time.sleep(0.2)
    started = time.process_time()
    time.sleep(0.5)
    spent = time.process_time() - started
    torch.set_num_threads(before)
    assert spent < 0.1


def test_two_threads_of_python_may_run_kernels_at_once(crew: int) -> None:
    wrong: list[BaseException] = []

    def several() -> None:
        try:
            for _ in range(100):
                _run(3, 200)
        except AssertionError as error:
            wrong.append(error)

    both = [threading.Thread(target=several) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not wrong


def test_changing_the_number_of_threads_ends_the_old_ones() -> None:
    before = torch.get_num_threads()
    for count in (2, 3, 2, 4, 2):
        torch.set_num_threads(count)
        _run()
    torch.set_num_threads(before)
    deadline = time.monotonic() + 5
    while (alive := [t for t in threading.enumerate() if t.name.startswith("dsv3-cpu-")]) and time.monotonic() < deadline:
        if len(alive) <= 1:
            break
        time.sleep(0.01)
    assert len(alive) <= 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python warns of forks with threads")
def test_a_forked_process_makes_its_own_team() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    _run()
    child = os.fork()
    if child == 0:
        # No cleanup of pytest's in the child.
        code = 1
        try:
            team.crew_size()
            _run()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned here")
def test_workers_stay_on_a_processor_each_where_asked_for() -> None:
    code = (
        "import os, threading, numpy as np, torch; torch.set_num_threads(2)\n"
        "from dsv3_cpu import team; made = team.Team(2)\n"
        "import time; time.sleep(0.3)\n"
        "found = [os.sched_getaffinity(t.native_id) for t in threading.enumerate() if t.name.startswith('dsv3-cpu')]\n"
        "print(found == [{sorted(os.sched_getaffinity(0))[1 % os.cpu_count()]}])"
    )
    environment = {**os.environ, "DSV3_CPU_PIN": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
