"""The bodies of requests: every field that is accepted, with its limits.

A field that is not listed is refused by name. A few fields of OpenAI's API that are not implemented are listed all
the same, for the values that clients send by habit and that ask for nothing (:class:`Neutral`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from anyfp4.engine.config import MAX_LOGPROBS

#: tags of unions; they are no part of a field's name and are left out of error messages
TAGS = frozenset({"as text", "as texts", "as tokens", "as token lists", "as parts"})
MAX_STOP_STRINGS, MAX_STOP_LENGTH, MAX_N = 16, 256, 128


class Neutral:
    """Marks a field that is not implemented and accepts only values that ask for nothing."""

    def __init__(self, *values: object) -> None:
        self.values = (None, *values)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Compares with the allowed values; 0 is not False."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The allowed values."""
        return {"enum": list(self.values)}

    def _check(self, value: object) -> object:
        if not any(type(value) is type(allowed) and value == allowed for allowed in self.values):
            raise PydanticCustomError("unsupported_parameter", "not supported by this server; leave it out")
        return value


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _check_text(value: str) -> str:
    # JSON can spell half a surrogate pair, which is no character and cannot be encoded
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise PydanticCustomError("invalid_value", "holds half a surrogate pair, which is no text")
    return value


Text = Annotated[str, AfterValidator(_check_text)]


def _prompt_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "as text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else 0
    return "as texts" if isinstance(first, str) else "as token lists" if isinstance(first, list) else "as tokens"


def _content_kind(value: object) -> str | None:
    return "as text" if isinstance(value, str) else "as parts" if isinstance(value, list) else None


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("as text")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("as texts")]
    | Annotated[Tokens, Tag("as tokens")]
    | Annotated[list[Tokens], Field(min_length=1, fail_fast=True), Tag("as token lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="invalid_type",
        custom_error_message="must be a string, a list of strings, a list of token ids, or a list of such lists",
    ),
]

StopString = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    Annotated[StopString, Tag("as text")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), Tag("as texts")],
    Discriminator(
        lambda value: "as text" if isinstance(value, str) else "as texts" if isinstance(value, list) else None,
        custom_error_type="invalid_type",
        custom_error_message="must be a string or a list of strings",
    ),
]


def _check_bias(value: dict[str, float]) -> dict[str, float]:
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise PydanticCustomError("invalid_value", "its keys must be token ids")
        if not -100 <= bias <= 100:
            raise PydanticCustomError("invalid_value", "its values must be from -100 to 100")
    return value


class StreamOptions(_Body):
    """What a stream carries besides the text.

    Attributes:
        include_usage: a last chunk with the token counts.
    """

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Neutral(False)] = None


class GenerationBody(_Body):
    """What completions and chat completions share; names as in OpenAI's API, the others as in vLLM."""

    model: Annotated[Text, Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # a divisor near 0 would make a logit infinite, which is an error of the engine and none of the request
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_check_bias)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[Text, Field(max_length=512)] | None = None

    metadata: Annotated[Any, Neutral({})] = None
    store: Annotated[Any, Neutral(False)] = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def bias(self) -> Mapping[int, float] | None:
        """``logit_bias`` by token id."""
        return {int(token): value for token, value in self.logit_bias.items()} if self.logit_bias else None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    suffix: Annotated[Any, Neutral("")] = None


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    """One message; the fields of an answer may come back as the client library stores them: empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("as text")]
        | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("as parts")],
        Discriminator(
            _content_kind,
            custom_error_type="invalid_type",
            custom_error_message="must be a string or a list of text parts",
        ),
    ]
    name: Annotated[Any, Neutral()] = None
    refusal: Annotated[Any, Neutral()] = None
    annotations: Annotated[Any, Neutral([])] = None
    audio: Annotated[Any, Neutral()] = None
    function_call: Annotated[Any, Neutral()] = None
    tool_calls: Annotated[Any, Neutral([])] = None

    def for_template(self) -> dict[str, str]:
        """Role and text, as chat templates want them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    response_format: Annotated[Any, Neutral({"type": "text"})] = None
    tools: Annotated[Any, Neutral([])] = None
    tool_choice: Annotated[Any, Neutral("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Neutral()] = None
    functions: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    audio: Annotated[Any, Neutral()] = None
    prediction: Annotated[Any, Neutral()] = None
    reasoning_effort: Annotated[Any, Neutral()] = None
    verbosity: Annotated[Any, Neutral()] = None
    web_search_options: Annotated[Any, Neutral()] = None


class TokenizeBody(_Body):
    """``POST /tokenize``: a prompt, or the messages of a chat."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None


class DetokenizeBody(_Body):
    """``POST /detokenize``."""

    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    skip_special_tokens: bool = False
