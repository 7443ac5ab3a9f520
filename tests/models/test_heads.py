"""Standing in a head's place: per thread, nested, and without a trace afterwards."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.models.heads import hidden_states, in_place_of
from llmdistill.texts import Rollout
from tests.tiny import llama

PATIENCE_S = 20.0  # a barrier that is not reached by then is never reached; a forward pass takes milliseconds


def rollout(seed: int = 0) -> Rollout:
    ids = torch.randint(4, 260, (2, 7), generator=torch.Generator().manual_seed(seed))
    return Rollout(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool), None)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """What the jobs return, each in a thread of its own; their first error is raised here."""
    found: list[Any] = [None] * len(jobs)

    def run(i: int) -> None:
        try:
            found[i] = jobs[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
        assert not thread.is_alive(), "a thread waits for ever"
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return found


def seen_at_the_head(model: Any, ids: Tensor, meet: Callable[[], Any]) -> Tensor:
    """The hidden rows that ``compute`` is handed, after it has met the other thread."""
    seen: list[Tensor] = []

    def compute(hidden_BTH: Tensor) -> Tensor:
        meet()
        seen.append(hidden_BTH)
        return hidden_BTH.sum()

    with torch.no_grad(), in_place_of(model.lm_head, compute):
        logits = model(input_ids=ids).logits
    assert logits.shape[-1] == 1
    assert not logits.any()
    return seen[0]


@torch.no_grad()
def alone(model: Any, ids: Tensor) -> Tensor:
    """The same hidden rows without any stand-in."""
    return model.model(input_ids=ids).last_hidden_state


def test_two_models_in_two_threads_do_not_wait_for_each_other() -> None:
    models, ids = [llama(1), llama(2)], [rollout(1).input_ids, rollout(2).input_ids]
    barrier = threading.Barrier(2, timeout=PATIENCE_S)  # inside compute: reached only if both are in there at once
    found = together(*(lambda m=m, i=i: seen_at_the_head(m, i, barrier.wait) for m, i in zip(models, ids, strict=True)))
    for model, tokens, hidden in zip(models, ids, found, strict=True):
        assert torch.equal(hidden, alone(model, tokens))


def test_one_model_in_two_threads_gives_each_its_own() -> None:
    model, ids = llama(1), [rollout(1).input_ids, rollout(2).input_ids]
    barrier = threading.Barrier(2, timeout=PATIENCE_S)
    found = together(*(lambda i=i: seen_at_the_head(model, i, barrier.wait) for i in ids))
    for tokens, hidden in zip(ids, found, strict=True):
        assert torch.equal(hidden, alone(model, tokens))
    assert "forward" not in vars(model.lm_head)


def test_a_thread_that_stands_nowhere_has_the_plain_head() -> None:
    model, ids = llama(1), rollout().input_ids
    expected = model(input_ids=ids).logits
    inside, done = threading.Event(), threading.Event()

    def meet() -> None:
        inside.set()
        assert done.wait(PATIENCE_S)

    def plain() -> Tensor:
        assert inside.wait(PATIENCE_S)
        logits = model(input_ids=ids).logits
        done.set()
        return logits

    _, logits = together(lambda: seen_at_the_head(model, ids, meet), plain)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_the_thread_that_stays_keeps_its_place(first_to_leave: int) -> None:
    """Whoever leaves first, be it the one that came first, takes nothing of the other away."""
    head, gone = llama(1).lm_head, threading.Event()
    entered = threading.Barrier(2, timeout=PATIENCE_S)
    calls: list[list[int]] = [[], []]

    def job(me: int) -> None:
        if me == 1:
            assert came_first.wait(PATIENCE_S)
        with in_place_of(head, lambda hidden_BTH: (calls[me].append(1), hidden_BTH.sum())[1]):
            came_first.set()
            entered.wait()
            if me != first_to_leave:
                assert gone.wait(PATIENCE_S)
                assert head(torch.ones(1, 2, 32)).shape == (1, 2, 1)
        if me == first_to_leave:
            assert head(torch.ones(1, 2, 32)).shape == (1, 2, 264)
            gone.set()

    came_first = threading.Event()
    together(lambda: job(0), lambda: job(1))
    assert calls[1 - first_to_leave] == [1]
    assert "forward" not in vars(head)


def test_a_context_inside_another_gives_the_place_back() -> None:
    head, hidden, calls = llama(1).lm_head, torch.ones(1, 2, 32), list[str]()
    with in_place_of(head, lambda h: (calls.append("outer"), h.sum())[1]):
        with in_place_of(head, lambda h: (calls.append("inner"), h.sum())[1]):
            head(hidden)
        assert head(hidden).shape == (1, 2, 1)
        with pytest.raises(ZeroDivisionError), in_place_of(head, lambda h: h.sum() / (1 // 0)):
            head(hidden)
        head(hidden)
    assert calls == ["inner", "outer", "outer"]
    assert head(hidden).shape == (1, 2, 264)


def test_a_forward_of_the_instances_own_is_put_back_and_used_elsewhere() -> None:
    """accelerate's hooks (device maps, offloading) live in the instance's forward."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    head, hidden = llama(1).lm_head, torch.ones(1, 2, 32)
    add_hook_to_module(head, ModelHook())
    hooked = head.forward
    with in_place_of(head, lambda h: h.sum()):
        assert head(hidden).shape == (1, 2, 1)
        (elsewhere,) = together(lambda: head(hidden))
        assert elsewhere.shape == (1, 2, 264)
    assert head.forward is hooked


def test_nothing_is_left_on_the_model() -> None:
    model, batch = llama(1), rollout()
    before = hidden_states(model, batch)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(hidden_states(twin, batch), before)
    assert set(vars(model.lm_head)) == set(vars(llama(1).lm_head))


def test_hooks_and_gradients_pass_through_the_head() -> None:
    """ZeRO-3 gathers in the head's hooks, DDP looks for parameters on the graph of the output."""
    model, batch, hooks = llama(1), rollout(), list[str]()
    model.lm_head.register_forward_pre_hook(lambda *_: hooks.append("before"))
    with in_place_of(model.lm_head, lambda h: (h @ model.lm_head.weight.T).logsumexp(-1).sum()):
        logits = model(input_ids=batch.input_ids).logits
    logits.sum().backward()
    assert hooks == ["before"]
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
