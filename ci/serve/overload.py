"""A server under ten times the load that it can take: does its memory stay flat, does it answer at once that it is full?

    python ci/serve/overload.py [--seconds 600] [--clients 64]

Starts `dsv3 serve` over the demo with room for 4 requests at a time and 16 that wait. Clients send one request after another,
streams and not, and leave some of them. Fails if memory grows by more than 5 % after the first tenth of the time, if an answer
is neither 200 nor 429, if a 429 takes longer than a second on this machine, or if blocks are held at the end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

BODY = {"prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": True, "temperature": 0.8}


def resident(pid: int) -> int:
    """Bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


class Clients:
    def __init__(self, port: int, count: int) -> None:
        self.port, self.codes, self.slow = port, Counter[int](), [0.0]
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]
        for thread in self.threads:
            thread.start()

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
            start = time.perf_counter()
            body = {**BODY, "stream": rng.random() < 0.5, "max_tokens": rng.randint(1, 80)}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            self.codes[response.status] += 1
            if response.status == 429:
                self.slow.append(time.perf_counter() - start)
                time.sleep(rng.random() * 0.5)
            if rng.random() < 0.9:
                response.read()
            connection.close()  # else it leaves


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    a = parser.parse_args()
    command = [sys.executable, "-m", "dsv3", "serve", "--port", "0", "--max-batch", "4", "--queue", "16", "--draft-tokens", "2"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = next(text for text in server.stderr if " at http://" in text)
    port = int(line.split("http://127.0.0.1:")[1].split()[0])
    clients = Clients(port, a.clients)
    seen: list[int] = []
    end = time.monotonic() + a.seconds
    while time.monotonic() < end:
        time.sleep(a.seconds / 60)
        seen.append(resident(server.pid))
    clients.stop.set()
    for thread in clients.threads:
        thread.join()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    figures = dict(t.rsplit(" ", 1) for t in connection.getresponse().read().decode().splitlines() if not t.startswith("#"))
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
    early, late = max(seen[5:12]), max(seen[-12:])
    slow = sorted(clients.slow)
    print(
        f"answers {dict(clients.codes)}; 429 in {1000 * slow[len(slow) // 2]:.0f} ms (median), {1000 * slow[-1]:.0f} ms (worst)"
    )
    print(f"resident {early >> 20} MB after a tenth, {late >> 20} MB at the end ({100 * (late / early - 1):+.1f} %)")
    held = float(figures["dsv3_cache_blocks"]) - float(figures["dsv3_free_cache_blocks"])
    print(f"blocks held at the end: {held:.0f}; exit code {code}")
    good = set(clients.codes) == {200, 429} and late < 1.05 * early and slow[-1] < 1.0 and held == 0 and code == 0
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
