"""What a request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

MAX_N = 16
MAX_STOPS, MAX_STOP_CHARS = 4, 128
MAX_TOOLS = 128
MAX_MESSAGES = 4096
MAX_PROMPTS = 64
MAX_RATED = 1 << 18  # log probabilities of a prompt's tokens in an answer
MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 64 << 10, 32
HEADER_BYTES, HEADER_LINES = 64 << 10, 100
STREAM_BYTES = 1 << 20  # of a stream that its client does not read


@dataclass(frozen=True)
class Limits:
    """body: bytes of a request; queue: requests that wait for their first step; queue_tokens: of their prompts together."""

    body: int = 4 << 20
    queue: int = 256
    queue_tokens: int = 1 << 20
