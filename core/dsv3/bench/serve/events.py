"""Server-sent events out of bytes that may be cut anywhere."""

from __future__ import annotations

import re

from dsv3.bench.serve.http import Failure

_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # a \r that comes last may be half of \r\n
_MOST = 1 << 22  # bytes of one event


class Events:
    """The data of each event. Comments and other fields are left out, and so is an event that the stream's end cuts off."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """What is complete with this piece. Failure "malformed" for what is not UTF-8, or longer than 4 MiB."""
        *lines, self._rest = _END.split(self._rest + piece)
        if len(self._rest) + sum(map(len, self._data)) > _MOST:
            raise Failure("malformed", "an event of more than 4 MiB")
        found = []
        for line in lines:
            if line:
                field, _, value = line.partition(b":")
                if field == b"data":
                    self._data.append(value.removeprefix(b" "))
                continue
            if any(self._data):
                try:
                    found.append(b"\n".join(self._data).decode())
                except UnicodeDecodeError as error:
                    raise Failure("malformed", f"an event is not UTF-8: {error}") from error
            self._data = []
        return found
