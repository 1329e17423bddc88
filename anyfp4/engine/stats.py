"""The engine's figures at one moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds now, and what it has done since it was made.

    Attributes:
        running: sequences that hold cache blocks.
        waiting: sequences queued.
        kv_blocks_total: blocks of the cache.
        kv_blocks_used: held by running sequences.
        kv_blocks_cached: free, but still with a prefix that can be reused.
        prompt_tokens_computed: tokens of prompts that were run, again after a preemption included.
        generated_tokens: tokens chosen.
        prefix_query_tokens: tokens of prompts that were looked up in the prefix cache.
        prefix_hit_tokens: those of them that were found.
        prefix_evicted_blocks: blocks of a reusable prefix that were overwritten because no other was free.
        preemptions: times that a sequence lost its blocks to an older one.
        steps: steps run.
        steps_ahead: those of them that were launched before the tokens of the step before were read.
        finished: sequences ended, for whatever reason.
        schedule_seconds: spent on choosing the steps' work.
        step_seconds: spent on steps in all, scheduling included.
    """

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int
    prompt_tokens_computed: int
    generated_tokens: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    prefix_evicted_blocks: int
    preemptions: int
    steps: int
    steps_ahead: int
    finished: int
    schedule_seconds: float
    step_seconds: float
