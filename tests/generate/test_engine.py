"""The engine: cached equals full, batch equals single, stops per row, and a bounded number of programs."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgpt4_jax.errors import UserError
from mgpt4_jax.generate.engine import Engine
from mgpt4_jax.generate.requests import Request, Update, length_buckets
from mgpt4_jax.generate.sampling import sampling_params
from mgpt4_jax.models import build
from tests.generate.conftest import make_engine
from tests.tiny import LLAMA, MINIGPT4

QUERIES = MINIGPT4.tokens_per_image
VOCAB = LLAMA.vocab_size


def prompt(rng: np.random.Generator, length: int, pictures: int = 0, **sampling: Any) -> Request:
    """Random ids with ``pictures`` runs of image slots after the first token."""
    count = pictures * QUERIES
    ids = rng.integers(3, VOCAB, length + count).astype(np.int32)
    slots = np.full(length + count, -1, np.int32)
    slots[1 : 1 + count] = np.arange(count)
    images = rng.standard_normal((count, LLAMA.hidden_size)).astype(np.float32) if pictures else None
    return Request(ids, slots, images, sampling_params({"max_new_tokens": 10, **sampling}))


def answers(engine: Engine, requests: list[Request], **options: Any) -> list[Update]:
    """All updates of each request joined into one."""
    joined = [Update(index, []) for index in range(len(requests))]
    for update in engine.run(requests, **options):
        old = joined[update.index]
        assert old.finish_reason is None, "an update after the end"
        joined[update.index] = Update(update.index, old.ids + update.ids, update.finish_reason)
    assert all(answer.finish_reason for answer in joined)
    return joined


def full_forward(params: Any, request: Request, new: int) -> list[int]:
    """Greedy ids by running the whole sequence through the model again for each token."""
    model = build(MINIGPT4)
    ids, slots = request.ids, request.slots
    images = None if request.images is None else request.images[None]
    for _ in range(new):

        def logits(ids: Any, slots: Any) -> Any:
            return model.apply(
                {"params": params}, ids, slots, images, method=lambda m, i, s, x: m.llama(m.embed(i, s, x))
            )

        best = int(jnp.argmax(logits(ids[None], slots[None])[0, -1]))
        ids, slots = np.append(ids, best).astype(np.int32), np.append(slots, -1).astype(np.int32)
    return ids[len(request.ids) :].tolist()


@pytest.mark.parametrize("pictures", [0, 2])
def test_cached_decoding_equals_the_full_forward(engine: Engine, params: Any, pictures: int) -> None:
    request = prompt(np.random.default_rng(1), 9, pictures, max_new_tokens=6)
    [answer] = answers(without_eos(engine), [request])
    assert answer.ids == full_forward(params, request, 6)
    assert answer.finish_reason == "length"


def without_eos(engine: Engine) -> Engine:
    other = copy.copy(engine)
    other.eos_ids = ()
    return other


def mixed_requests(rng: np.random.Generator) -> list[Request]:
    """21 requests of mixed lengths, pictures, parameters, seeds and stops: more than there are slots."""
    requests = []
    for index in range(21):
        sampling: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, 24)), "seed": index}
        if index % 3 == 0:
            sampling |= {"temperature": 1.0, "top_p": 0.9, "top_k": int(rng.integers(0, 50))}
        if index % 4 == 0:
            sampling |= {"repetition_penalty": 1.3}
        if index % 5 == 0:
            sampling |= {"stop_ids": [int(i) for i in rng.integers(3, VOCAB, 8)], "min_new_tokens": 1}
        requests.append(prompt(rng, int(rng.integers(1, 60)), int(rng.integers(0, 4)), **sampling))
    return requests


def test_batch_equals_single_whatever_the_mix(engine: Engine, rng: np.random.Generator) -> None:
    requests = mixed_requests(rng)
    together = answers(engine, requests)
    for index, request in enumerate(requests):
        [alone] = answers(engine, [request])
        assert (together[index].ids, together[index].finish_reason) == (alone.ids, alone.finish_reason), index
    assert answers(engine, requests, chunk=1) == together
    assert answers(engine, requests[::-1], chunk=5)[::-1] == [
        dataclasses.replace(answer, index=len(requests) - 1 - answer.index) for answer in together
    ]
    assert {answer.finish_reason for answer in together} == {"stop", "length"}


def test_sharded_equals_unsharded(engine: Engine, params: Any, rng: np.random.Generator) -> None:
    sharded = make_engine(MINIGPT4, params, "data=2,fsdp=2,tensor=2", slots=8, max_length=128)
    requests = mixed_requests(rng)
    kernel = sharded.params["layers"][0]["qkv"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(96, 32)}
    assert answers(sharded, requests) == answers(engine, requests)


def test_requests_are_taken_only_as_slots_become_free(engine: Engine, rng: np.random.Generator) -> None:
    taken = []

    def source() -> Any:
        for index in range(40):
            taken.append(index)
            yield prompt(rng, 5, max_new_tokens=3)

    run = engine.run(source())
    next(run)
    assert len(taken) == engine.slots
    assert sum(update.finish_reason is not None for update in run) + 1 >= 40


def test_a_longer_request_later_grows_the_cache(engine: Engine, rng: np.random.Generator) -> None:
    requests = [prompt(rng, 4, max_new_tokens=20) for _ in range(8)] + [prompt(rng, 90, max_new_tokens=30)]
    together = answers(engine, requests)
    assert [answers(engine, [request])[0].ids for request in requests] == [answer.ids for answer in together]


def test_stop_sequences_stop_their_row_only(engine: Engine, rng: np.random.Generator) -> None:
    plain = [prompt(rng, 6, max_new_tokens=12) for _ in range(4)]
    free = answers(without_eos(engine), plain)
    ids = free[1].ids
    stop = dataclasses.replace(plain[1].sampling, stop_ids=(tuple(ids[3:6]), (VOCAB - 1, 1)))
    single = dataclasses.replace(plain[2].sampling, stop_ids=((free[2].ids[4],),))
    requests = list(plain)
    requests[1] = dataclasses.replace(plain[1], sampling=stop)
    requests[2] = dataclasses.replace(plain[2], sampling=single)
    stopped = answers(without_eos(engine), requests)
    assert stopped[1].ids == ids[:6] and stopped[1].finish_reason == "stop"
    assert stopped[2].ids == free[2].ids[: free[2].ids.index(free[2].ids[4]) + 1]
    assert [stopped[0], stopped[3]] == [free[0], free[3]]


def test_the_host_can_stop_a_row(engine: Engine, rng: np.random.Generator) -> None:
    requests = [prompt(rng, 6, max_new_tokens=50) for _ in range(12)]
    free = answers(engine, requests)
    seen: list[int] = []

    def watch(ids: list[int]) -> bool:
        seen.extend(ids)
        return len(seen) >= 20

    watched = [*requests[:3], dataclasses.replace(requests[3], watch=watch), *requests[4:]]
    stopped = answers(engine, watched, chunk=4)
    assert stopped[3].finish_reason == "stop" and 20 <= len(stopped[3].ids) < 25
    assert stopped[3].ids == free[3].ids[: len(stopped[3].ids)]
    assert stopped[:3] + stopped[4:] == free[:3] + free[4:]


def test_eos_ends_an_answer_and_min_new_tokens_delays_it(engine: Engine, params: Any, rng: np.random.Generator) -> None:
    request = prompt(rng, 5, max_new_tokens=8)
    [free] = answers(without_eos(engine), [request])
    eos = make_engine(MINIGPT4, params, slots=1, max_length=128, eos_ids=(free.ids[2],))
    [short] = answers(eos, [request])
    assert short.ids == free.ids[: free.ids.index(free.ids[2]) + 1] and short.finish_reason == "stop"
    delayed = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, min_new_tokens=6))
    [long] = answers(eos, [delayed])
    assert len(long.ids) > 6 and free.ids[2] not in long.ids[:6]


def test_random_requests_compile_no_more_than_the_buckets(params: Any, rng: np.random.Generator) -> None:
    engine = make_engine(MINIGPT4, params, slots=4, max_length=64)
    compiled: list[str] = []

    def count(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def requests(number: int) -> list[Request]:
        return [
            prompt(
                rng,
                int(rng.integers(1, 40)),
                int(rng.integers(0, 3)),
                max_new_tokens=int(rng.integers(1, 12)),
                temperature=float(rng.integers(0, 2)),
                top_p=float(rng.uniform(0.1, 1)),
                seed=int(rng.integers(0, 1000)),
            )
            for _ in range(number)
        ]

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        answers(engine, requests(200))
        for number in (1, 2, 3):
            answers(engine, requests(number))
        assert len(compiled) <= len(engine.buckets())
        assert engine.num_compiled() <= len(engine.buckets())
        compiled.clear()
        for number in (1, 2, 3, 50):
            answers(engine, requests(number))
        assert engine.num_compiled() <= len(engine.buckets())
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_changing_sampling_compiles_nothing(engine: Engine, rng: np.random.Generator) -> None:
    request = prompt(rng, 7)
    answers(engine, [request])
    before = engine.num_compiled()
    others = ({"temperature": 0.7, "seed": 3}, {"top_k": 4, "top_p": 0.3}, {"repetition_penalty": 2.0, "stop_ids": [5]})
    for values in others:
        answers(engine, [dataclasses.replace(request, sampling=sampling_params({"max_new_tokens": 9, **values}))])
    assert engine.num_compiled() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "empty"),
        ({"length": 120}, "exceed the context of 128"),
        ({"length": 5, "max_new_tokens": 5000}, "exceed the context of 128"),
        ({"length": 5, "stop_ids": [100000]}, "stop_ids"),
    ],
)
def test_impossible_requests_are_refused(engine: Engine, rng: np.random.Generator, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(engine.run([prompt(rng, **change)]))


def test_too_many_pictures_are_refused(engine: Engine, rng: np.random.Generator) -> None:
    with pytest.raises(UserError, match="17 pictures"):
        engine.check(prompt(rng, 5, 17))


def test_length_buckets() -> None:
    assert length_buckets(2048) == [32, 64, 128, 256, 512, 1024, 2048]
    assert length_buckets(100) == [32, 64, 100]
    assert length_buckets(20) == [20]


@pytest.mark.parametrize("slots", [0, 3, 12])
def test_slots_are_a_power_of_two(params: Any, slots: int) -> None:
    with pytest.raises(UserError, match="power of two"):
        make_engine(MINIGPT4, params, slots=slots)
