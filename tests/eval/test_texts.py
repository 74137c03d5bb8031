"""Texts, the stream they become, and the windows it is cut into."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dsv3
from dsv3.errors import UsageError
from dsv3.eval import Text, read_texts
from dsv3.eval.stream import Stream, cut, encode


def test_files_and_folders_in_order(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / "folder" / name).write_text(f"text {name}")
    (tmp_path / "z.md").write_bytes(b"\xef\xbb\xbfwith a byte order mark\r\n")
    found = read_texts([tmp_path / "z.md", str(tmp_path / "folder")])
    assert [(t.name, t.content) for t in found] == [
        ("z.md", "with a byte order mark\r\n"), ("a.txt", "text a.txt"), ("b.txt", "text b.txt"),
    ]  # fmt: skip
    again = [str(tmp_path / "folder" / "a.txt")] * 2
    assert [t.name for t in read_texts(again)] == again


def test_documents_are_stripped_and_empty_ones_left_out() -> None:
    assert Text("t", " one\n<|endoftext|>\n \n<|endoftext|>two ").documents == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b" \n<|endoftext|>\n", "is empty"), (b"caf\xe9", "not UTF-8 (byte 3)"), (None, "does not exist")],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_texts([path])
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_a_folder_without_texts_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"folder without \*\.txt"):
        read_texts([tmp_path])
    with pytest.raises(UsageError, match="no text to score"):
        read_texts([])


def test_the_stream_is_bos_tokens_eos(model: dsv3.Model, texts: list[Text]) -> None:
    stream = encode(model, texts)
    documents = [(n, d) for n, text in enumerate(texts) for d in text.documents]
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = [[0, *tokenizer.encode_plain(d), 1] for _, d in documents]
    assert stream.ids.tolist() == [t for part in ids for t in part]
    assert stream.owner.tolist() == [n for (n, _), part in zip(documents, ids, strict=True) for _ in part]
    assert stream.nbytes.sum() == pytest.approx(sum(len(d.encode()) for _, d in documents))
    assert len(stream.first(10)) == 11 and len(stream.first(None)) == len(stream)


@pytest.mark.parametrize(
    ("tokens", "window", "size", "count"),
    [(9, 8, 8, 1), (16, 8, 8, 1), (17, 8, 8, 2), (18, 8, 8, 2), (8, 8, 7, 1), (3, 8, 2, 1), (5, 2, 2, 2)],
)
def test_windows_are_full_but_for_a_single_short_one(tokens: int, window: int, size: int, count: int) -> None:
    ids = np.arange(tokens)
    found = cut(Stream(ids, ids // 4, np.ones(tokens)), window, 8)
    assert (found.size, found.count, found.tokens) == (size, count, size * count)
    rows = np.concatenate(list(found.batches(2 * size)))
    assert rows.tolist() == [list(range(w * size, w * size + size + 1)) for w in range(count)]
    assert found.owner.tolist() == [(i + 1) // 4 for i in range(size * count)]


def test_batches_hold_at_most_what_is_asked_and_at_least_a_window() -> None:
    ids = np.arange(71)
    found = cut(Stream(ids, ids, np.ones(71)), 10, 100)
    assert [len(b) for b in found.batches(39)] == [3, 3, 1]
    assert [len(b) for b in found.batches(5)] == [1] * 7


def test_too_little_text_and_too_long_a_window_are_refused() -> None:
    ids = np.arange(100)
    with pytest.raises(UsageError, match="at least 3"):
        cut(Stream(ids[:2], ids[:2], np.ones(2)), 8, 100)
    with pytest.raises(UsageError, match="reads at most 63"):
        cut(Stream(ids, ids, np.ones(100)), 64, 63)
    assert cut(Stream(ids[:20], ids[:20], np.ones(20)), 64, 63).size == 19


def test_importing_the_package_costs_no_torch() -> None:
    code = (
        "import sys, dsv3, dsv3.eval; from dsv3.eval import read_texts; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
