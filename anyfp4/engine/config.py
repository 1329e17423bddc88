"""What a user may set: of one request (SamplingParams) and of the engine (EngineConfig)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anyfp4.errors import InvalidArgumentError

MAX_LOGPROBS = 100
MAX_PENALTY = 2.0
MAX_BIAS = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation stops; names and meanings as in vLLM.

    The order of work on the logits: ``logit_bias``, ``min_tokens``, penalties (repetition, frequency, presence),
    temperature, ``top_k``, ``top_p``, ``min_p``. Log-probabilities are the model's own, before all of them.

    Attributes:
        n: completions of one prompt; the i-th has random numbers of its own under the same seed.
        temperature: 0 is greedy.
        top_p: keep the most likely tokens that together have this probability, in (0, 1].
        top_k: keep the k most likely tokens; 0 or −1 for all.
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        seed: of the random numbers; None draws one.
        presence_penalty: taken off the logit of every token that was generated before, in [−2, 2].
        frequency_penalty: likewise, times how often it was generated, in [−2, 2].
        repetition_penalty: the logit of a token of the prompt or the completion is divided by this if it is positive,
            else multiplied; above 0, and 1 does nothing.
        logit_bias: token → what is added to its logit, in [−100, 100].
        max_tokens: at most this many new tokens; None: up to the model's limit; 0 computes the prompt alone.
        min_tokens: no end-of-sequence token, stop token or stop string ends the text before it has this many tokens.
        stop: strings that end the text; not part of it unless ``include_stop_str_in_output``.
        stop_token_ids: tokens that end the text, besides the model's own end-of-sequence tokens.
        ignore_eos: go on after an end-of-sequence token.
        logprobs: log-probabilities of this many most likely tokens at every new position, and of the chosen one.
        prompt_logprobs: likewise for the prompt's tokens.
        include_stop_str_in_output: keep the stop string.
        skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _require(self.n >= 1, f"n must be at least 1, got {self.n}")
        _require(0 <= self.temperature < float("inf"), f"temperature must be 0 or more, got {self.temperature}")
        _require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        _require(self.top_k >= 0, f"top_k must be 0 (all) or more, got {self.top_k}")
        _require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}")
        _require(self.seed is None or -(2**63) <= self.seed < 2**64, f"seed must fit 64 bits, got {self.seed}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(abs(value) <= MAX_PENALTY, f"{name} must be in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}], got {value}")
        _require(
            0 < self.repetition_penalty < math.inf, f"repetition_penalty must be above 0, got {self.repetition_penalty}"
        )
        for token, bias in (self.logit_bias or {}).items():
            _require(
                abs(bias) <= MAX_BIAS,
                f"logit_bias of token {token} must be in [-{MAX_BIAS:g}, {MAX_BIAS:g}], got {bias}",
            )
        limit = self.max_tokens
        _require(limit is None or limit >= 0, f"max_tokens must be 0 or more, got {limit}")
        _require(self.min_tokens >= 0, f"min_tokens must be 0 or more, got {self.min_tokens}")
        _require(
            limit is None or self.min_tokens <= limit, f"min_tokens = {self.min_tokens} exceeds max_tokens = {limit}"
        )
        _require(all(isinstance(s, str) and s for s in stop), "stop strings must not be empty")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= MAX_LOGPROBS, f"{name} must be 0…{MAX_LOGPROBS}, got {value}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return tuple(self.stop or ())


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs; none of it changes a request's tokens or log-probabilities.

    Attributes:
        max_model_len: most tokens of prompt and completion together; None: the model's own limit.
        max_num_seqs: sequences that run at the same time.
        max_step_tokens: tokens of one step; longer prompts are cut into chunks.
        block_size: tokens of one block of the KV cache.
        kv_cache_bytes: of the KV cache; None: what ``max_num_seqs`` sequences of ``max_model_len`` tokens need, but no
            more than what ``memory_fraction`` leaves after the weights and a step's activations, or, on a CPU, where
            that is None, a quarter of the machine's memory.
        memory_fraction: of the device's memory that may be in use in all, by other programs too, above 0 to 1; None:
            0.9 of a GPU's, and all of a CPU's. A model that needs more is refused before it is loaded.
        enable_prefix_caching: keep the keys and values of full blocks, and reuse them where a prompt begins alike.
        cuda_graphs: launch steps of up to 512 tokens as CUDA graphs; None: where the device and the model's layers can.
        async_scheduling: launch a step before the tokens of the one before it are read, so that the device does not
            wait for the host; None: where steps run as CUDA graphs. True is allowed elsewhere, and gains nothing there.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_step_tokens: int = 2048
    block_size: int = 16
    kv_cache_bytes: int | None = None
    memory_fraction: float | None = None
    enable_prefix_caching: bool = True
    cuda_graphs: bool | None = None
    async_scheduling: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_step_tokens", "block_size", "kv_cache_bytes"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be 1 or more, got {value}")
        fraction = self.memory_fraction
        _require(fraction is None or 0 < fraction <= 1, f"memory_fraction must be in (0, 1], got {fraction}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidArgumentError(message)
