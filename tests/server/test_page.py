"""The chat page without a browser: it loads nothing from elsewhere, has nothing inline, and never makes markup of text. How it
behaves is `ci/page/check.mjs`'s to prove."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dsv3.server import page

FOLDER = Path(page.__file__).parent
SCRIPTS = sorted(FOLDER.glob("*.js"))
_VOID = {"meta", "link", "input", "br", "img", "hr"}
# Ways in which text becomes markup or code.
_UNSAFE = re.compile(
    r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|setHTMLUnsafe|DOMParser|srcdoc|eval)\b"
    r"|\bnew\s+Function\b|\bset(Timeout|Interval)\(\s*[\"'`]|javascript:|\bimport\("
)
_FOREIGN = re.compile(r"\b(?:https?|wss?|ftp):|[\"'(]//", re.IGNORECASE)


class Reader(HTMLParser):
    """Elements with their attributes, ids, and what a strict policy forbids; tags must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "style":
            self.inline.append("style element")
        self.inline += [f"{tag} {name}" for name, _ in attrs if name == "style" or name.startswith("on")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1:] == ["script"]:
            self.inline.append("script element")


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open, f"never closed: {reader.open}"
    return reader


@pytest.fixture(scope="module")
def html() -> Reader:
    return read((FOLDER / "index.html").read_text(encoding="utf-8"))


def test_the_reader_sees_what_is_forbidden() -> None:
    bad = read('<p style="x" onclick="y">z</p><script>a()</script><style>b</style>')
    assert bad.inline == ["p style", "p onclick", "script element", "style element"]
    for text in ("a.innerHTML = b", "eval(a)", "new Function('a')", "setTimeout('a()')", "x.outerHTML", 'import("a")'):
        assert _UNSAFE.search(text), text
    for text in ("https://a.b/c.js", "url(//a.b)", '"//a.b/c.js"'):
        assert _FOREIGN.search(text), text


def test_nothing_is_inline(html: Reader) -> None:
    assert html.inline == []


def test_everything_it_loads_is_served(html: Reader) -> None:
    served = page.files()
    assert set(served) == {"/", "/chat.css", *(f"/{path.name}" for path in SCRIPTS)} and "/chat.js" in served
    assert served["/"][0].startswith("text/html") and served["/chat.js"][0].startswith("text/javascript")
    loaded = [a.get("src") or a.get("href") for tag, a in html.elements if tag in ("script", "link", "img", "iframe")]
    assert sorted(filter(None, loaded)) == ["chat.css", "chat.js", "data:,"]
    for path in SCRIPTS:
        imports = re.findall(r"^import .* from \"\./([a-z]+\.js)\";$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(f"/{name}" in served for name in imports), path.name
        assert path.read_text(encoding="utf-8").count("import ") == len(imports), path.name
    assert re.findall(r"url\(|@import|@font-face", served["/chat.css"][1].decode()) == []


@pytest.mark.parametrize("path", [*SCRIPTS, FOLDER / "chat.css", FOLDER / "index.html"], ids=lambda path: path.name)
def test_nothing_from_elsewhere(path: Path) -> None:
    found = _FOREIGN.search(path.read_text(encoding="utf-8"))
    assert found is None, f"{path.name}: {found}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_text_never_becomes_markup(path: Path) -> None:
    found = _UNSAFE.search(path.read_text(encoding="utf-8"))
    assert found is None, f"{path.name}: {found}"


def test_the_key_is_kept_for_the_session_only() -> None:
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert "document.cookie" not in text and "indexedDB" not in text
        assert "localStorage" not in text or ("KEPT" in text and "sessionStorage" not in text), path.name


def test_every_name_that_scripts_and_labels_use_is_there(html: Reader) -> None:
    ids = [a["id"] for _, a in html.elements if "id" in a]
    assert len(ids) == len(set(ids))
    used = {name for path in SCRIPTS for name in re.findall(r'\$\("([^"]+)"\)', path.read_text(encoding="utf-8"))}
    for _, attributes in html.elements:
        for name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
            used |= set((attributes.get(name) or "").split())
    assert used and used <= set(ids), used - set(ids)


def test_controls_have_names(html: Reader) -> None:
    labels = {a.get("for") for tag, a in html.elements if tag == "label"}
    fields = [a for tag, a in html.elements if tag in ("input", "select", "textarea")]
    assert fields and all(a.get("id") in labels for a in fields)
    assert all("type" in a for tag, a in html.elements if tag == "button")


def test_the_policy_allows_the_page_and_no_more() -> None:
    rules = dict(rule.strip().split(" ", 1) for rule in page.POLICY.split(";"))
    assert rules["default-src"] == "'none'" and rules["script-src"] == "'self'" and rules["style-src"] == "'self'"
    assert "unsafe" not in page.POLICY and "*" not in page.POLICY


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_events_and_blocks_however_they_are_cut(tmp_path: Path) -> None:
    """The parser of streams, on every way to cut a stream into two, and byte by byte; the formatter on fences."""
    for path in SCRIPTS:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "try.mjs").write_text(_TRY)
    done = subprocess.run(["node", "try.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ways"] > 100 and found["all"] == ['["{\\"a\\": \\"é😀\\"}","two\\nlines","[DONE]"]']
    assert found["blocks"] == [
        {"code": False, "text": "One\ntwo"}, {"code": True, "text": "a\n\nb"}, {"code": False, "text": "after"},
        {"code": True, "text": "open"},
    ]  # fmt: skip
    assert found["nothing"] == [] and found["shares"] == [4, 0, 0, 0] and found["none"] == [0, 0]
    assert found["summary"].startswith("Busiest expert 4.0× even load (layer 3, expert 0). 3 of 4 unused. 7 tokens")


_TRY = r"""
import { events } from "./api.js";
import { blocks } from "./text.js";
import { shares, summary } from "./experts.js";
const text = ': hello\r\ndata: {"a": "é😀"}\r\n\r\nevent: x\ndata: two\ndata:lines\n\ndata\n\n' +
  ': ping\n\ndata: [DONE]\r\rdata: cut';
const bytes = new TextEncoder().encode(text);
async function parsed(parts) {
  const stream = new ReadableStream({ start(c) { parts.forEach((part) => c.enqueue(part)); c.close(); } });
  const found = [];
  for await (const data of events(stream)) found.push(data);
  return JSON.stringify(found);
}
const all = new Set();
let ways = 0;
for (let i = 0; i <= bytes.length; i++, ways++) all.add(await parsed([bytes.slice(0, i), bytes.slice(i)]));
all.add(await parsed([...bytes].map((b) => new Uint8Array([b]))));
console.log(JSON.stringify({
  ways, all: [...all], nothing: blocks("\n\n "),
  blocks: blocks("One\ntwo\n\n```js\na\n\nb\n```\nafter\n```\nopen"),
  shares: shares([7, 0, 0, 0]), none: shares([0, 0]),
  summary: summary({ layers: [{ layer: 3, counts: [7, 0, 0, 0] }], tokens: 7 }),
}));
"""
