"""AsyncLLM: the same bits as LLM for many clients at a time; leaving, slow readers, full queues, draining, death."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from anyfp4 import LLM, EngineConfig, SamplingParams
from anyfp4.async_llm import AsyncLLM
from anyfp4.engine.outputs import RequestOutput
from anyfp4.errors import EngineError, EngineStoppedError, InvalidArgumentError, QueueFullError

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, config=EngineConfig(max_num_seqs=8))


@pytest.fixture(autouse=True)
def nothing_left(llm: LLM) -> Iterator[None]:
    yield
    # a thread whose loop is gone ends when it next has something to say
    for thread in [t for t in threading.enumerate() if t.name == "anyfp4-engine"]:
        thread.join(60)
    assert not any(t.name == "anyfp4-engine" for t in threading.enumerate())
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


@asynccontextmanager
async def started(llm: LLM, **options: Any) -> AsyncIterator[AsyncLLM]:
    engine = AsyncLLM(llm, **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown(drain=False)


@pytest.fixture
def slow(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of at least 5 ms, so that there is time to do something while a request runs."""
    step = llm.engine.step

    def sleepy() -> Any:
        time.sleep(0.005)
        return step()

    monkeypatch.setattr(llm.engine, "step", sleepy)


async def last(stream: Any) -> RequestOutput:
    return [output async for output in stream][-1]


async def eventually(condition: Any, seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        await asyncio.sleep(0.005)


def test_many_clients_get_what_llm_gives(llm: LLM) -> None:
    prompts = [f"client {i % 7} says {'hello ' * (i % 5)}" for i in range(40)]
    params = [
        SamplingParams(temperature=i % 3 / 2, seed=i, n=1 + i % 2, max_tokens=3 + i % 9, logprobs=2, ignore_eos=True)
        for i in range(40)
    ]

    async def client(engine: AsyncLLM, i: int) -> RequestOutput:
        await asyncio.sleep(i % 4 * 0.003)
        async with engine.submit(prompts[i], params[i], request_id=f"c{i}") as stream:
            assert stream.request_id == f"c{i}"
            outputs = [output async for output in stream]
        for earlier, later in itertools.pairwise(outputs):
            assert not earlier.finished
            for a, b in zip(earlier.outputs, later.outputs, strict=True):
                assert b.token_ids[: len(a.token_ids)] == a.token_ids and b.text.startswith(a.text)
        assert outputs[-1].finished and outputs[-1].prompt_token_ids == stream.prompt_token_ids
        return outputs[-1]

    async def main() -> list[RequestOutput]:
        async with started(llm) as engine:
            outputs = await asyncio.gather(*(client(engine, i) for i in range(40)))
            assert engine.healthy and engine.stats().waiting == engine.stats().running == 0
            return outputs

    got = asyncio.run(main())
    for output, expected in zip(got, llm.generate(prompts, params), strict=True):
        assert output.outputs == expected.outputs and output.prompt == expected.prompt


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("how", ["leave", "aclose", "cancel"])
def test_leaving_frees_the_blocks(llm: LLM, how: str) -> None:
    async def main() -> None:
        async with started(llm) as engine:
            stream = engine.submit("hello", LONG)

            async def client() -> None:
                async with stream:
                    async for _ in stream:
                        if how == "leave":
                            break
                        if how == "aclose":
                            await stream.aclose()

            task = asyncio.create_task(client())
            if how == "cancel":
                await eventually(lambda: engine.stats().running == 1)
                task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() == (how == "cancel")
            steps = engine.stats().steps
            await eventually(lambda: engine.stats().kv_blocks_used == 0)
            assert engine.stats().steps <= steps + 2
            await stream.aclose()  # again is harmless
            assert [o async for o in stream] == []
            # the engine goes on for others
            assert len((await last(engine.submit("a", LONG))).outputs[0].token_ids) == 200

    asyncio.run(main())


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("how", ["never read", "read once", "by another thread"])
def test_dropping_the_stream_frees_the_blocks(llm: LLM, how: str) -> None:
    async def main() -> None:
        async with started(llm) as engine:
            done = engine.stats().finished
            streams = [engine.submit("hello", LONG)]
            if how == "read once":
                await anext(streams[0])
            await eventually(lambda: engine.stats().running == 1)
            if how == "by another thread":
                await asyncio.to_thread(streams.clear)
            streams.clear()
            await eventually(lambda: engine.stats().running == 0, 0.5)  # 200 steps take a second
            assert engine.stats().finished == done + 1
            assert len((await last(engine.submit("a", LONG))).outputs[0].token_ids) == 200

    asyncio.run(main())


@pytest.mark.usefixtures("slow")
def test_a_task_that_waits_keeps_its_stream(llm: LLM) -> None:
    async def main() -> None:
        ends = []

        async def client(engine: AsyncLLM) -> None:
            ends.append(await last(engine.submit("hello", LONG)))

        async with started(llm) as engine:
            asyncio.create_task(client(engine))  # noqa: RUF006  (nobody holds it)
            for _ in range(20):
                await asyncio.sleep(0.01)
                gc.collect()
            await eventually(lambda: ends)
            assert len(ends[0].outputs[0].token_ids) == 200

    asyncio.run(main())


@pytest.mark.usefixtures("slow")
def test_abort_ends_with_what_there_is(llm: LLM) -> None:
    async def main() -> None:
        async with started(llm) as engine:
            stream = engine.submit("hello", LONG)
            first = await anext(stream)
            stream.abort()
            end = await last(stream)
            assert end.outputs[0].finish_reason == "abort" and not first.finished
            queued = engine.submit("hello", LONG)
            queued.abort()  # before the engine has even seen it
            assert (await last(queued)).outputs[0].token_ids == ()

    asyncio.run(main())


def test_a_slow_reader_gets_the_newest(llm: LLM) -> None:
    async def main() -> None:
        async with started(llm) as engine:
            before = engine.stats().finished
            stream = engine.submit("hello", LONG)
            await eventually(lambda: engine.stats().finished > before)
            await asyncio.sleep(0.02)
            outputs = [output async for output in stream]
            assert len(outputs) == 1 and len(outputs[0].outputs[0].token_ids) == 200

    asyncio.run(main())


@pytest.mark.usefixtures("slow")
def test_a_full_queue_refuses(llm: LLM) -> None:
    async def main() -> None:
        async with started(llm, max_waiting=2) as engine:
            streams = [engine.submit("hello", LONG) for _ in range(9)]
            with pytest.raises(QueueFullError, match=r"full: 9 sequences .* room for 10 \(8 running, 2 wait") as error:
                engine.submit("hello", SamplingParams(n=2))
            assert 1 <= error.value.retry_after <= 60
            streams.append(engine.submit("hello", LONG))
            with pytest.raises(QueueFullError):
                engine.submit("hello", LONG)
            with pytest.raises(InvalidArgumentError, match="n = 11: at most 10 sequences"):
                engine.submit("hello", SamplingParams(n=11))
            await eventually(lambda: engine.stats().running == 8)
            assert engine.stats().waiting == 2
            await streams[0].aclose()
            await eventually(lambda: engine.stats().waiting == 1)
            streams.append(engine.submit("hello", SamplingParams(max_tokens=1)))
            for stream in streams:
                stream.abort()
            await asyncio.gather(*(last(s) for s in streams[1:]))

    asyncio.run(main())


def test_bad_requests_are_refused_by_submit(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncLLM(llm)
        with pytest.raises(EngineStoppedError, match="not started"):
            engine.submit("a", LONG)
        await engine.start()
        with pytest.raises(EngineStoppedError, match="started before"):
            await engine.start()
        with pytest.raises(EngineError, match="in use by AsyncLLM"):
            await AsyncLLM(llm).start()
        with pytest.raises(EngineError, match="in use by AsyncLLM"):
            llm.generate("a")
        with pytest.raises(InvalidArgumentError, match="empty"):
            engine.submit("", LONG)
        with pytest.raises(InvalidArgumentError, match="300 tokens"):
            engine.submit("x" * 300, LONG)
        stream = engine.submit("a", LONG, request_id="same")
        with pytest.raises(InvalidArgumentError, match="request_id 'same' is in use"):
            engine.submit("a", LONG, request_id="same")
        await last(stream)
        await last(engine.submit("a", LONG, request_id="same"))
        await engine.shutdown()
        with pytest.raises(EngineStoppedError, match="shut down"):
            engine.submit("a", LONG)
        assert not engine.healthy

    asyncio.run(main())
    with pytest.raises(InvalidArgumentError, match="max_waiting"):
        AsyncLLM(llm, max_waiting=-1)


@pytest.mark.usefixtures("slow")
def test_shutdown_drains(llm: LLM) -> None:
    async def main() -> None:
        async with started(llm) as engine:
            tasks = [asyncio.create_task(last(engine.submit("hello", LONG))) for _ in range(12)]
            await asyncio.sleep(0.02)
            ending = asyncio.create_task(engine.shutdown(drain=True))
            await asyncio.sleep(0)
            with pytest.raises(EngineStoppedError, match="shut down"):
                engine.submit("a", LONG)
            await ending
            assert all(t.result().outputs[0].finish_reason == "length" for t in await finished(tasks))

    asyncio.run(main())


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("options", [{"drain": False}, {"drain": True, "timeout": 0.05}])
def test_shutdown_that_does_not_wait(llm: LLM, options: dict[str, Any]) -> None:
    async def main() -> None:
        async with started(llm) as engine:
            tasks = [asyncio.create_task(last(engine.submit("hello", LONG))) for _ in range(12)]
            await asyncio.sleep(0.02)
            began = time.monotonic()
            await engine.shutdown(**options)
            assert time.monotonic() - began < 1
            reasons = {t.result().outputs[0].finish_reason for t in await finished(tasks)}
            assert reasons == {"abort"}

    asyncio.run(main())


async def finished(tasks: list[asyncio.Task[RequestOutput]]) -> list[asyncio.Task[RequestOutput]]:
    await asyncio.wait(tasks, timeout=5)
    return tasks


def test_a_dead_engine_is_told_to_everyone(tiny_model: Path) -> None:
    llm = LLM(tiny_model)
    step, steps = llm.engine.step, iter(range(5))

    def dying() -> Any:
        time.sleep(0.02)
        if next(steps, None) is None:
            raise RuntimeError("the disk is on fire")
        return step()

    llm.engine.step = dying  # type: ignore[method-assign]

    async def main() -> None:
        async with started(llm) as engine:
            tasks = [asyncio.create_task(last(engine.submit("hello", LONG))) for _ in range(3)]
            await asyncio.wait(tasks, timeout=5)
            for task in tasks:
                error = task.exception()
                assert isinstance(error, EngineStoppedError)
                assert "RuntimeError: the disk is on fire" in str(error)
                assert isinstance(error.__cause__, RuntimeError)
            assert not engine.healthy
            with pytest.raises(EngineStoppedError, match="the disk is on fire"):
                engine.submit("hello", LONG)

    asyncio.run(main())
    with pytest.raises(EngineError, match="in use by AsyncLLM"):  # nobody knows what state it is in
        llm.generate("a")


def test_an_idle_engine_sleeps(llm: LLM) -> None:
    async def main() -> float:
        async with started(llm) as engine:
            await last(engine.submit("a", LONG))
            began = time.process_time()
            await asyncio.sleep(0.5)
            return time.process_time() - began

    assert asyncio.run(main()) < 0.25


def test_a_loop_that_is_gone_stops_the_thread(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncLLM(llm)
        await engine.start()
        await anext(engine.submit("hello", LONG))

    asyncio.run(main())
    until = time.monotonic() + 60
    while any(t.name == "anyfp4-engine" for t in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.01)
    llm.lend(None)
