"""The HTML page: well formed, self-contained, safe, accessible."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from dsv3.conformance.report import html, plot
from dsv3.conformance.result import Report
from tests.support.reports import HOSTILE, case, large, report

_VOID = {"meta", "input", "br", "hr", "img", "link"}
_LOADING = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background", "formaction"}


class _Page(HTMLParser):
    """Elements in order; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({k for k, _ in attrs}) == len(attrs), attrs
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        if self.open:
            self.inside.setdefault(self.open[-1], []).append(data)


def _hostile() -> Report:
    waiver = {"reason": HOSTILE, "url": "javascript:alert(1)", "pattern": "*"}
    cases = [
        case(f"linear/{HOSTILE}", "failed", kernel=HOSTILE, message=HOSTILE * 200, repeat=HOSTILE, margin=math.nan,
             numerics=HOSTILE,
             details={"expected": HOSTILE, "found": "</dd></script>", "output": HOSTILE, "index": (HOSTILE, 1)}),
        case(f"x/{HOSTILE}", op=HOSTILE, margin=math.inf),
        case("linear/w", "waived", margin=-math.inf, message=HOSTILE, details={"waiver": waiver}),
        case("linear/a", "absent", message=HOSTILE),
    ]  # fmt: skip
    info: dict[str, Any] = {
        "plugin": {"dist": HOSTILE, "version": HOSTILE, "files": {HOSTILE: HOSTILE}},
        "device": {"family": HOSTILE, "name": HOSTILE, "arch": HOSTILE, "driver": HOSTILE},
        "notes": [HOSTILE],
        "unmatched_waivers": [HOSTILE],
        "unexpected_passes": [HOSTILE],
    }
    return report(cases, backend=HOSTILE, **info)


@pytest.mark.parametrize("made", [large(600), _hostile(), report([])], ids=["large", "hostile", "empty"])
def test_the_page_is_well_formed_and_loads_nothing(made: Report) -> None:
    text = html.page([made])
    page = _Page(text)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        assert tag not in ("iframe", "object", "embed", "base", "link", "img")
        for name in _LOADING & attributes.keys():
            value = attributes[name] or ""
            if value.startswith("#"):
                assert value[1:] in ids, value
            else:  # only a waiver's link, which the reader may follow
                assert tag == "a" and re.match(r"https?://", value), value
    assert "url(" not in text and "@import" not in text
    assert [t for t, _ in page.tags].count("script") == 1


def test_only_the_script_and_style_of_the_page_itself_may_run() -> None:
    page = _Page(html.page([_hostile()]))
    policy = next(a["content"] or "" for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256("".join(page.inside[tag]).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_is_accessible_without_scripts() -> None:
    page = _Page(html.page([large(600)]))
    names = [t for t, _ in page.tags]
    assert ("html", {"lang": "en"}) in page.tags and "title" in names
    assert all("scope" in a for t, a in page.tags if t == "th")
    assert all(a.get("aria-label") for t, a in page.tags if t == "svg")
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for t, a in page.tags if a.get("class") == "scroll")
    assert next(a for t, a in page.tags if t == "form").get("hidden", "missing") is None, "a filter needs the script"
    shown = [a for t, a in page.tags if t == "tr" and (a.get("id") or "").startswith("case-")]
    assert len(shown) == len(large(600).cases) and not any("hidden" in a for a in shown)


def test_failures_say_expected_found_where_and_how_to_repeat() -> None:
    details = {"output": "o", "index": (1, 2), "expected": 0.5, "found": 0.75, "error": 0.25, "budget": 0.01}
    text = html.page([report([case("mla_decode/x", "failed", details=details)])])
    block = re.search(r"<article.*?</article>", text, re.S)
    assert block
    for words in ("mla_decode/x", "0.5", "0.75", "output o, index (1, 2)", "0.25, budget 0.01", "--cases mla_decode/x"):
        assert words in block[0], words


def test_marks_stand_where_their_margins_are_and_failures_are_never_merged_away() -> None:
    places = [plot.place(m) for m in (0.0, 1e-9, 1e-4, 0.01, 0.5, 1.0, 9.0, 11.0)]
    assert places == sorted(places) and places[1] == places[2]
    assert plot.place(math.nan) == plot.place(math.inf) == places[-1]
    cases = [case(f"linear/{i}", margin=0.1) for i in range(500)] + [case("linear/bad", "failed", margin=0.1)]
    strip = "".join(plot.plot(report(cases)))
    assert 'class="bad"' in strip and "linear/bad: margin 0.1<" in strip
    assert "and 495 more" in strip and strip.count("<circle") == 5


def test_several_backends_stand_beside_each_other() -> None:
    page = html.page([large(100), report([case("linear/a")], backend="other"), report([case("linear/a")], backend="other")])
    assert '<th scope="col">acme</th><th scope="col">other (acme_1) #1</th><th scope="col">other (acme_1) #2</th>' in page
    _Page(page)
