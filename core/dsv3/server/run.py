"""The process: a socket, uvicorn, keys, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from dsv3.errors import UsageError
from dsv3.server.limits import HEADER_BYTES
from dsv3.server.service import Service


def read_keys(path: Path | None, value: str | None) -> list[str]:
    """Keys from a file, one a line, and from the environment, by commas; UsageError for a file that others may read."""
    found = [key.strip() for key in (value or "").split(",")]
    if path is not None:
        try:
            if os.name == "posix" and path.stat().st_mode & 0o004:
                raise UsageError(f"{path}: every user of this machine may read the keys; chmod 600 {path}")
            found += path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}: the keys cannot be read") from error
    keys = [key.strip() for key in found if key.strip() and not key.strip().startswith("#")]
    if path is not None and not keys:
        raise UsageError(f"{path} holds no key; write one on each line")
    return keys


def check_exposure(host: str, keys: list[str], insecure: bool) -> None:
    """UsageError for a server without keys that others could reach."""
    if not keys and not insecure and not _is_local(host):
        raise UsageError(
            f"--host {host} lets other machines in, and there are no API keys: give --key-file FILE or DSV3_API_KEYS, or say "
            "--insecure if everybody may use it"
        )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; UsageError says why there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(1024)  # who comes before the model is loaded waits, and finds nobody else at this address
    except OSError as error:
        made.close()
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}; try --port 0 for a free one") from error
    return made


class _Server(uvicorn.Server):
    """uvicorn's, which ends with 0 when it is asked to stop: its own raises the signal once more after all is done."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        if self._service.draining and number == signal.SIGINT:
            self.force_exit = True  # asked twice
        if not self._service.draining:
            print("dsv3: stopping: no more requests are taken, those at hand are finished", file=sys.stderr)
        self._service.draining = True
        self.should_exit = True


def serve(app: Starlette, service: Service, listening: socket.socket, drain: float) -> None:
    """Until SIGTERM or SIGINT, and then until the requests at hand are done, or for `drain` seconds."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, http="h11", ws="none", lifespan="on", server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES, timeout_graceful_shutdown=max(1, round(drain)), timeout_keep_alive=30,
    )  # fmt: skip
    server = _Server(config, service)
    asyncio.run(server.serve(sockets=[listening]))
