"""Engines behind HTTP: any OpenAI-compatible endpoint, and the teacher-rollout service.

Requests survive what networks do (:class:`~llmdistill.wire.transport.Transport`): time-outs, 429 and 5xx are tried
again with growing pauses, several replicas share the work. When nothing answers for ``max_outage_s`` the evaluation
stops; what was drawn is on disk, and the same command goes on from there.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import httpx
from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.evals.engines.base import Asked
from llmdistill.evals.records import Sample
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.texts.rollout import Prompt, Sampling
from llmdistill.wire.transport import Get, Request, Transport, json_object

Api = Literal["chat", "completions"]
ANSWER_BYTES, TOKEN_BYTES = 1 << 22, 256  # that are read of an answer: whatever it is about, and for a token


class OpenAIEngine:
    """``/v1/chat/completions`` (the endpoint's own template) or ``/v1/completions`` (ours, as token ids).

    Args:
        url: of the endpoint, with or without ``/v1``; several replicas with commas.
        model: the name the endpoint knows it by; empty: the first one it lists.
        api: which of the two.
        thinking: sent as vLLM's and SGLang's ``chat_template_kwargs``; None: not sent.
        chat_template_kwargs: sent beside it.
        options: of :class:`~llmdistill.wire.transport.Transport`.

    Raises:
        UserError: no endpoint there within ``max_outage_s``, or not that model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: Api,
        concurrency: int,
        thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.model, self.api, self.thinking, self.concurrency = model, api, thinking, concurrency
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.context: int | None = None  # vLLM says it; OpenAI's protocol does not
        self.transport = Transport(
            url, section="eval", admit=self._admit, in_flight=concurrency, keeps_answers=False, **options
        )
        try:
            self.transport.wait_ready()
        except BaseException:
            self.close()
            raise

    def draw(self, asked: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        def one(item: Asked) -> Sample:
            body = {
                "model": self.model,
                **({"max_tokens": item.room} if item.room else {}),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": item.seed,
                "n": 1,
                **self._not_openai(sampling),
                **({"stop": list(stop)} if stop else {}),
                **self._prompt(item),
            }
            path = "/v1/chat/completions" if self.api == "chat" else "/v1/completions"
            text, tokens, finish = self.transport.send(
                Request(
                    path,
                    self._parse,
                    body=json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"),
                    max_bytes=ANSWER_BYTES + TOKEN_BYTES * (item.room or sampling.max_new_tokens),
                )
            )
            return item.sample(text, tokens, finish, stop)

        return in_threads(one, asked, self.concurrency)

    def close(self) -> None:
        self.transport.close()

    def _not_openai(self, sampling: Sampling) -> dict[str, Any]:
        """Settings that OpenAI refuses. Servers of open models (they tell their context) would otherwise take them from
        the checkpoint, and a score would depend on the engine."""
        if self.context is None:
            return {"top_k": sampling.top_k} if sampling.top_k else {}
        return {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0}

    def _prompt(self, item: Asked) -> dict[str, Any]:
        if self.api == "completions":
            return {"prompt": list(item.ids)}
        messages = [*item.messages]
        extra: dict[str, Any] = {}
        if item.prefill:
            messages.append({"role": "assistant", "content": item.prefill})
            extra = {"continue_final_message": True, "add_generation_prompt": False}
        told = {} if self.thinking is None else {"enable_thinking": self.thinking}
        if told := {**told, **self.chat_template_kwargs}:
            extra["chat_template_kwargs"] = told
        return {"messages": messages, **extra}

    def _parse(self, response: httpx.Response) -> tuple[str, int, str]:
        body = json_object(response)
        choice = body["choices"][0]
        text = choice["text"] if self.api == "completions" else choice["message"].get("content") or ""
        if self.api == "chat":
            # a server that parses reasoning hands it over apart: put back, so that it is judged as thinking
            thoughts = choice["message"].get("reasoning_content") or choice["message"].get("reasoning")
            if thoughts:
                text = f"<think>{thoughts}</think>{text}" if text or choice["finish_reason"] == "stop" else thoughts
                text = text if "</think>" in text else f"<think>{text}"
        if not isinstance(text, str):
            raise ValueError("a choice without text")
        usage = body.get("usage") or {}
        return text, int(usage.get("completion_tokens") or 0), str(choice.get("finish_reason") or "stop")

    def _admit(self, get: Get) -> None:
        cards = {str(card["id"]): card for card in json_object(get("/v1/models")).get("data", [])}
        names = list(cards)
        if not self.model and names:
            self.model = names[0]
        if self.model not in names:
            raise UserError(
                f"the endpoint serves {', '.join(names) or 'no model'}, not {self.model!r}. "
                "Fix: --model with one of these names, or leave it out for the first."
            )
        self.context = cards[self.model].get("max_model_len")


class RemoteEngine:
    """The teacher-rollout service. It says which weights it has; samples of other weights are refused, not mixed in.

    Args:
        url: of the service; several replicas with commas.
        tokenizer: of the model it serves, for prompts and texts.
    """

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, *, concurrency: int, **options: Any) -> None:
        self.tokenizer, self.concurrency = tokenizer, concurrency
        self.teacher = RemoteTeacher(url, tokenizer=tokenizer, in_flight=concurrency, section="eval", **options)

    def draw(self, asked: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        def one(item: Asked) -> Sample:
            wanted = replace(sampling, max_new_tokens=item.room, samples_per_prompt=1, seed=item.seed)
            drawn = self.teacher.generate([Prompt(list(item.ids), item.text)], wanted)
            ids = drawn.input_ids[0][drawn.completion_mask[0]].tolist()
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            return item.sample(text, len(ids), str(drawn.finish[0]), stop)

        return in_threads(one, asked, self.concurrency)

    def close(self) -> None:
        self.teacher.close()


def in_threads(work: Callable[[Asked], Sample], items: Sequence[Asked], workers: int) -> Iterator[Sample]:
    """Results as they are finished. The first error ends it: what is done by then comes first, then the error.

    Daemon threads, not a pool: Ctrl-C has to end the process without waiting for answers that are on their way.
    """
    todo = iter(items)
    lock = threading.Lock()
    done: queue.SimpleQueue[Sample | BaseException] = queue.SimpleQueue()
    failed = threading.Event()

    def run() -> None:
        while not failed.is_set():
            with lock:
                item = next(todo, None)
            if item is None:
                return
            try:
                done.put(work(item))
            except BaseException as error:
                failed.set()
                done.put(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    try:
        received, error = 0, None
        while received < len(items):
            result = done.get()
            if isinstance(result, BaseException):
                error = result
                break
            received += 1
            yield result
        while error is not None and not done.empty():  # paid for and finished: not to be lost
            if isinstance(late := done.get(), Sample):
                yield late
        if error is not None:
            raise error
    finally:
        failed.set()
