"""A real server in this process, on a free port, over the demo model."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import uvicorn

import dsv3
from tests.support.checkpoints import TINY, random_tensors, write_hf
from tests.support.tokenizers import deepseek_folder, v32_tokenizer


class Running:
    """A server in a thread: its base URL, its service, its app."""

    def __init__(
        self, model: dsv3.Model, keys: tuple[str, ...] = (), limits: Any = None, drafts: int = 0, **engine: Any
    ) -> None:
        from dsv3.server.app import build
        from dsv3.server.limits import HEADER_BYTES, Limits
        from dsv3.server.metrics import Metrics
        from dsv3.server.run import bound
        from dsv3.server.service import Service

        made = model.serve_with(**{"cache_tokens": 16384, **engine})
        self.service = Service(model, made, "demo", limits or Limits(), Metrics(), drafts)
        self.app = build(self.service, keys)
        listening = bound("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self.app, log_level="error", http="h11", ws="none", h11_max_incomplete_event_size=HEADER_BYTES)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[listening])), daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="package")
def demo_model() -> dsv3.Model:
    return dsv3.load("demo", dtype="float32")


@pytest.fixture(scope="package")
def deepseek_model(tmp_path_factory: pytest.TempPathFactory) -> dsv3.Model:
    """A random model with DeepSeek's own tokenizer: what it says is noise, with the real markers."""
    folder = tmp_path_factory.mktemp("deepseek") / "deepseek"
    config = {
        **TINY, "vocab_size": 129280, "hidden_size": 64, "max_position_embeddings": 2048, "num_nextn_predict_layers": 0,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    write_hf(folder, config, random_tensors(config, dtype=torch.float32))
    shutil.copy(deepseek_folder() / "tokenizer_config.json", folder)
    (folder / "tokenizer.json").write_text(v32_tokenizer().to_json(), encoding="utf-8")
    return dsv3.load(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def server(demo_model: dsv3.Model) -> Iterator[Running]:
    running = Running(demo_model)
    yield running
    running.stop()
