"""`dsv3 serve` before it serves: keys, addresses, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.errors import UsageError
from dsv3.server.run import bound, check_exposure, read_keys


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\none\n\n two \n")
    path.chmod(0o600)
    assert read_keys(path, "three,, four") == ["three", "four", "one", "two"]
    assert read_keys(None, None) == []
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        read_keys(path, None)
    path.chmod(0o600)
    path.write_text("# none\n")
    with pytest.raises(UsageError, match="holds no key"):
        read_keys(path, None)
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "absent", None)


def test_without_keys_only_this_machine_is_let_in() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        check_exposure(host, [], False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(UsageError, match="--key-file"):
            check_exposure(host, [], False)
        check_exposure(host, ["key"], False)
        check_exposure(host, [], True)


def test_an_address_that_is_taken_is_named() -> None:
    taken = bound("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}: .*--port 0"):
        bound("127.0.0.1", port)
    taken.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--key-file"), (["--max-batch", "0"], "--max-batch is 0"), (["--device", "meta"], "meta"),
        (["--draft-tokens", "-1"], "--draft-tokens is -1"), (["--draft-tokens", "99"], "--draft-tokens is 99; expected 0 to 8"),
        (["--step-tokens", "0"], "--step-tokens is 0; expected at least 32"), (["--drain", "-5"], "--drain is -5"),
        (["--drain", "nan"], "--drain is nan"), (["--port", "99999"], "--port is 99999; expected 0 to 65535"),
        (["--cache-tokens", "0"], "--cache-tokens is 0"),
        (["--port", "0", "--chat-format", "deepseek_r1"], "no token </think>"),
        (["--key-file", "/nowhere/keys"], "cannot be read"),
    ],
)  # fmt: skip
def test_wrong_arguments_end_at_once(arguments: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dsv3", "serve", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
