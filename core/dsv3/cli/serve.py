"""`dsv3 serve`: an OpenAI-compatible server over one model, and a chat page."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3.cli.common import load_model, settings_of
from dsv3.engine.options import MAX_DRAFTS
from dsv3.errors import UsageError
from dsv3.settings import environment_keys

if TYPE_CHECKING:
    from dsv3.engine.model import Model

_SEQUENCE = 4096  # tokens of each request that the cache has room for by itself
_SHARE = 4  # of the free memory, at most one part of so many


def main(arguments: argparse.Namespace) -> int:
    from dsv3.server.run import bound, check_exposure, read_keys

    settings = settings_of(arguments)
    _check(arguments)
    if settings["device"] == "meta":
        raise UsageError("device 'meta' has shapes but no weights; it cannot serve")
    keys = read_keys(Path(arguments.key_file) if arguments.key_file else None, environment_keys())
    check_exposure(arguments.host, keys, arguments.insecure)
    listening = bound(arguments.host, arguments.port)  # before a model is loaded for nothing
    try:
        model = load_model(arguments, settings)
        if arguments.chat_format:
            _ = model.chat_format  # now, and not at every request
        return _serve(arguments, model, keys, listening)
    finally:
        listening.close()


def _check(arguments: argparse.Namespace) -> None:
    for name, least, most in (
        ("max_batch", 1, None), ("draft_tokens", 0, MAX_DRAFTS), ("queue", 1, None), ("port", 0, 65535), ("drain", 0, 86400),
        ("cache_tokens", 1, None), ("step_tokens", arguments.max_batch, None),
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and not (least <= value and (most is None or value <= most)):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            why = ", one for each request (--max-batch)" if name == "step_tokens" else ""
            raise UsageError(f"--{name.replace('_', '-')} is {value}; expected {wanted}{why}")


def _serve(arguments: argparse.Namespace, model: Model, keys: list[str], listening: socket.socket) -> int:
    from dsv3.server.app import build
    from dsv3.server.limits import Limits
    from dsv3.server.metrics import Metrics
    from dsv3.server.run import serve
    from dsv3.server.service import Service

    print(f"dsv3: {model.placement().summary}", file=sys.stderr)
    for note in model.placement().notes:
        print(f"dsv3: note: {note}", file=sys.stderr)
    most = arguments.max_batch
    tokens = arguments.cache_tokens or _cache_tokens(model, most)
    engine = model.serve_with(cache_tokens=tokens, most=most, budget=arguments.step_tokens)
    longest = min(_SEQUENCE, model.config.max_position_embeddings, tokens)
    model.warm_up(most, True, tokens=longest, draft="mtp" if arguments.draft_tokens and model.graph.mtp else None)
    model.prepare_grammars()
    name = arguments.name or model.placement().model
    service = Service(model, engine, name, Limits(queue=arguments.queue), Metrics(), arguments.draft_tokens)
    app = build(service, keys, arguments.insecure)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    key = f"{len(keys)} API keys" if keys else "no API keys"
    print(
        f"dsv3: {name} at http://{shown}:{port} ({key}; {tokens:,} tokens of cache, {most} requests at a time"
        + (f", {service.drafts} drafts)" if service.drafts else ")"),
        file=sys.stderr, flush=True,
    )  # fmt: skip
    serve(app, service, listening, arguments.drain)
    return 0


def _cache_tokens(model: Model, most: int) -> int:
    """Room for a batch of requests of some length, or for what a share of the free memory holds."""
    wanted = most * min(_SEQUENCE, model.config.max_position_embeddings)
    each = model.cache_bytes_per_token
    free = _free_memory(model)
    return max(model.page_size, min(wanted, free // _SHARE // each) if free else wanted)


def _free_memory(model: Model) -> int:
    """Bytes; 0 where the system does not say."""
    if model.device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(model.device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
