"""The bodies of requests, as msgspec structs, from which the OpenAPI document is made too. Fields that change nothing here are
taken and ignored; fields nobody knows are errors, for a misspelt one would be ignored in silence."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from dsv3.engine.options import MAX_DRAFTS, MAX_LOGPROBS
from dsv3.server.limits import MAX_MESSAGES, MAX_N, MAX_STOP_CHARS, MAX_STOPS, MAX_TOOLS

Count = Annotated[int, Meta(ge=0, le=1 << 31)]
Ids = Annotated[list[Annotated[int, Meta(ge=0, le=1 << 31)]], Meta(min_length=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Struct, forbid_unknown_fields=True):
    name: str = "answer"
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    grammar: str | None = None


class Sampled(Struct, kw_only=True, forbid_unknown_fields=True):
    """What all generations have in common. draft_tokens, ignore_eos, top_k, min_p, repetition_penalty are extensions."""

    model: str = ""
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    draft_tokens: Annotated[int, Meta(ge=0, le=MAX_DRAFTS)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class CompletionRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[Any], Meta(min_length=1)] | None
    max_tokens: Count | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None


class Function(Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}(?!\n)$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class NamedFunction(Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: NamedFunction


class Called(Struct):
    name: str
    arguments: str = "{}"


class ToolCall(Struct):
    function: Called
    id: str = ""
    type: str = "function"


class TextPart(Struct, tag_field="type", tag="text"):
    text: str


class RefusalPart(Struct, tag_field="type", tag="refusal"):
    refusal: str


class Message(Struct):
    """role: system, developer, user, assistant or tool."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart] | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Thinking(Struct, forbid_unknown_fields=True):
    """As DeepSeek's own API has it."""

    type: Literal["enabled", "disabled"]


class TemplateArguments(Struct, forbid_unknown_fields=True):
    """As vLLM's and SGLang's clients write it."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class ChatRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions. thinking is an extension: whether a model that can do either thinks aloud; it is
    taken in other servers' forms too."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    thinking: bool | Thinking | None = None
    chat_template_kwargs: TemplateArguments | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: str | None = None
    prediction: dict[str, Any] | None = None

    @property
    def thinks(self) -> bool | None:
        """What is asked for; None where nothing is said."""
        if isinstance(self.thinking, Thinking):
            return self.thinking.type == "enabled"
        if self.thinking is None and (given := self.chat_template_kwargs) is not None:
            return given.enable_thinking if given.thinking is None else given.thinking
        return self.thinking


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/tokenize: a text as a prompt would be, or a conversation."""

    model: str = ""
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/detokenize."""

    model: str = ""
    tokens: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 31)]], Meta(max_length=1 << 20)]


BODIES: dict[str, type[Struct]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/tokenize": TokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
}
