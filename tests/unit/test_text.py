"""Text in pieces is the whole text; stop strings cut the same way however the text arrives; templates; the tokenizer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3.engine.chat import ChatFormat
from dsv3.engine.text import StopFinder, Tokenizer
from dsv3.resources import resources


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_folder(resources("configs", "demo"))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model() -> dsv3.Model:
    return dsv3.load("demo")


TOKENIZER = Tokenizer.from_folder(resources("configs", "demo"))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_encode_has_one_bos_and_decodes_back(text: str) -> None:
    assert TOKENIZER is not None
    ids = TOKENIZER.encode(text)
    assert ids[0] == 0 and ids.count(0) == 1 + text.count("<｜begin▁of▁sentence｜>")
    if "<｜" not in text:
        assert TOKENIZER.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab\n", max_size=14), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), max_size=14),
)  # fmt: skip
def test_stop_strings_cut_alike_however_text_arrives(text: str, stops: list[str], sizes: list[int]) -> None:
    """The one that is complete first wins."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    wanted = text[: min(ends)[1]] if ends else text
    finder, shown, at = StopFinder(stops), "", 0
    for size in [*sizes, len(text)]:
        shown += finder.push(text[at : at + size])
        at += size
    shown += finder.finish()
    assert shown == wanted
    assert finder.stopped == bool(ends)


def test_stop_trims_text_and_ids_together(model: dsv3.Model) -> None:
    whole = model.generate("Once upon a time", max_new_tokens=40)
    cut = model.generate("Once upon a time", max_new_tokens=40, stop=[" was very", "never"])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(" was very")]
    assert model.tokenizer.decode(cut.ids) == cut.text
    assert whole.ids[: len(cut.ids)] == cut.ids
    drafted = model.generate("Once upon a time", max_new_tokens=40, stop=[" was very", "never"], draft="mtp")
    assert (drafted.text, drafted.ids) == (cut.text, cut.ids)
    streamed = "".join(model.stream("Once upon a time", max_new_tokens=40, stop=" was very"))
    assert streamed == cut.text


def test_streaming_is_generation(model: dsv3.Model) -> None:
    options = {"max_new_tokens": 30, "temperature": 1.2, "seed": 3}
    pieces = list(model.stream("The little fox", **options))
    assert len(pieces) > 5
    assert "".join(pieces) == model.generate("The little fox", **options).text


def test_seeds_repeat_and_differ(model: dsv3.Model) -> None:
    one, two, three = (model.generate("A", max_new_tokens=20, temperature=1.0, seed=s).ids for s in (1, 1, 2))
    assert one == two != three
    free = {tuple(model.generate("A", max_new_tokens=20, temperature=1.0).ids) for _ in range(3)}
    assert len(free) > 1


@pytest.mark.parametrize("prompts", [{"a": 1}, 5, None, b"abc", [1.5], [[True]]])
def test_what_is_no_prompt_is_refused(model: dsv3.Model, prompts: object) -> None:
    with pytest.raises(dsv3.UsageError, match=r"prompts is|token id"):
        model.generate(prompts, max_new_tokens=1)


def test_a_tiny_top_p_is_greedy(model: dsv3.Model) -> None:
    wanted = model.generate("The king", max_new_tokens=15).ids
    assert model.generate("The king", max_new_tokens=15, temperature=2.0, top_p=1e-9, seed=4).ids == wanted


def test_prompts_come_in_all_forms(model: dsv3.Model) -> None:
    ids = model.tokenizer.encode("The king")
    one = model.generate("The king", max_new_tokens=4)
    assert model.generate(ids, max_new_tokens=4).ids == one.ids
    many = model.generate(["The king", ids, "A"], max_new_tokens=4)
    assert [m.ids for m in many[:2]] == [one.ids, one.ids] and len(many) == 3
    assert model.generate([], max_new_tokens=4) == []
    assert model.generate("A", max_new_tokens=0).ids == []
    assert one.stats.keys() == {
        "prompt_tokens", "cached_tokens", "new_tokens", "ttft_s", "prefill_tok_s", "decode_tok_s", "steps", "graph_steps",
        "drafted", "accepted", "tokens_per_step",
    }  # fmt: skip


def test_eos_ends_and_is_not_part_of_the_ids() -> None:
    """With the full stop as end of text."""
    model = dsv3.load("demo")
    whole = model.generate("Once upon a time", max_new_tokens=30)
    stop = model.tokenizer.encode_plain(".")[0]
    assert stop in whole.ids
    model.config = dataclasses.replace(model.config, eos_token_id=(4095, stop))
    for draft in (None, "mtp"):
        found = model.generate("Once upon a time", max_new_tokens=30, draft=draft)
        assert (found.finish_reason, found.ids) == ("stop", whole.ids[: whole.ids.index(stop)])
        assert found.text == model.tokenizer.decode(found.ids)
    assert model.generate("Once upon a time", max_new_tokens=30, ignore_eos=True).ids == whole.ids


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("x", {"max_new_tokens": -1}), ("x", {"temperature": -0.1}), ("x", {"temperature": float("nan")}), ("x", {"top_p": 0}),
        ("x", {"top_p": 1.5}), ("x", {"stop": [""]}), ("x", {"draft": "eagle"}), ([99999], {}), ([-1], {}), ([[]], {}),
        ([1] * 5000, {}), ("x", {"max_new_tokens": 2.5}),
        (None, {}), ("x", {"stop": None}), ("x", {"seed": "a"}), ([[1.5]], {}),
        ([True], {}), (5, {}), ("\ud800", {}), ([None], {}), ("x", {"temperature": "hot"}),
    ],
)  # fmt: skip
def test_bad_requests_are_usage_errors(model: dsv3.Model, prompt: object, options: dict[str, object]) -> None:
    with pytest.raises(dsv3.UsageError):
        model.generate(prompt, **options)


def test_generation_ends_at_the_models_length(model: dsv3.Model) -> None:
    found = model.generate([5] * 4090, max_new_tokens=50, ignore_eos=True)
    assert len(found.ids) == 6 and found.finish_reason == "length"
    assert model.generate([5] * 4090, max_new_tokens=50, ignore_eos=True, draft="mtp").ids == found.ids


def test_the_default_template_is_deepseeks(tokenizer: Tokenizer, model: dsv3.Model) -> None:
    messages = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"},
    ]  # fmt: skip
    assert ChatFormat.of(tokenizer).render(messages) == (
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜><｜User｜>Bye<｜Assistant｜>"
    )
    ids = model.chat_ids(messages)
    assert ids.count(0) == 1 and ids.count(3) == 2 and ids.count(4) == 2
    assert model.chat(messages, max_new_tokens=3).ids == model.generate(ids, max_new_tokens=3).ids
    with pytest.raises(dsv3.UsageError, match="role must be"):
        model.chat([{"role": "robot", "content": "x"}])
    with pytest.raises(dsv3.UsageError, match="expected"):
        model.chat([{"text": "x"}])


def test_a_models_own_template_is_used_in_a_sandbox(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resources("configs", "demo", name), tmp_path / name)
    settings_ = json.loads((tmp_path / "tokenizer_config.json").read_text())
    own = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings_, "chat_template": own}))
    found = Tokenizer.from_folder(tmp_path)
    assert found is not None
    assert ChatFormat.of(found).render([{"role": "user", "content": "x"}]) == "<｜begin▁of▁sentence｜>[user]x"
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    hostile = Tokenizer.from_folder(tmp_path)
    assert hostile is not None
    with pytest.raises(dsv3.UsageError, match="unsafe"):
        ChatFormat.of(hostile).render([{"role": "user", "content": "x"}])


def test_streams_can_be_open_together_and_leave_no_mode_behind(model: dsv3.Model) -> None:
    wanted = [model.generate(p, max_new_tokens=6).text for p in ("Once upon", "The king")]
    first, second = (model.stream(p, max_new_tokens=6) for p in ("Once upon", "The king"))
    pieces: list[list[str]] = [[next(first)], [next(second)]]
    assert not torch.is_inference_mode_enabled()
    pieces[0] += list(first)
    pieces[1] += list(second)
    assert ["".join(p) for p in pieces] == wanted
    logits = model.logits([0, 5, 6])
    logits.div_(2)  # an ordinary tensor
    assert not logits.is_inference()


def test_ids_may_be_numpys_or_torchs(model: dsv3.Model) -> None:
    ids = model.tokenizer.encode("The king")
    wanted = model.generate(ids, max_new_tokens=4).ids
    for form in (np.array(ids), list(np.array(ids)), torch.tensor(ids), list(torch.tensor(ids)), tuple(ids)):
        assert model.generate(form, max_new_tokens=4).ids == wanted
    assert [g.ids for g in model.generate(torch.tensor([ids, ids]), max_new_tokens=4)] == [wanted, wanted]
    assert torch.equal(model.logits(np.array(ids)), model.logits(ids))


@pytest.mark.parametrize("ids", [None, "abc", [1.5], [True], torch.tensor([1.5]), torch.zeros(2, 2, dtype=torch.int64), []])
def test_logits_take_token_ids_only(model: dsv3.Model, ids: object) -> None:
    with pytest.raises(dsv3.UsageError):
        model.logits(ids)


@pytest.mark.parametrize(
    "messages", [None, "hi", [{"role": 1, "content": "x"}], [{"role": "user", "content": None}], ["x"], {}]
)
def test_chat_takes_messages_only(model: dsv3.Model, messages: object) -> None:
    with pytest.raises(dsv3.UsageError):
        model.chat(messages)


def test_nan_logits_are_an_error_and_no_token() -> None:
    model = dsv3.load("demo")
    model._graph.w.norm[0] = float("nan")
    with pytest.raises(dsv3.Dsv3Error, match="NaN logits"):
        model.generate("Once", max_new_tokens=2)
