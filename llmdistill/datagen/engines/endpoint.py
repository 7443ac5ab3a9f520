"""Any OpenAI-compatible chat endpoint. Requests survive what networks do: see :mod:`llmdistill.wire.transport`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal

import httpx

from llmdistill.datagen.calls import Call, Drawn, Unanswerable
from llmdistill.datagen.engines.base import Workers, ended
from llmdistill.datagen.engines.probe import NAMED, PROMPTS, Probe, body, read_answer
from llmdistill.errors import UserError
from llmdistill.wire.patience import Failed
from llmdistill.wire.transport import Get, Refused, Request, Transport, json_object

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
ANSWER_BYTES, TOKEN_BYTES = 1 << 22, 512  # that are read of an answer: whatever it is about, and for a token
OF_ONE_CALL = (400, 413, 422)  # refusals that are about what was asked, not about who asks
BROKEN_TRIES = 8  # HTTP 500 to one call that stop all: public endpoints have bad minutes
SLACK = 1e-3  # an engine in 16 bits may report a log-prob so much above 0


class EndpointEngine:
    """``/v1/chat/completions`` with the endpoint's own template.

    Args:
        model: the name the endpoint knows it by; empty: the first one it lists.
        logprobs: ask for the sampled tokens' log-probs. "auto": of servers that tell their context (vLLM does), which
            then give token ids too.
        chat_template_kwargs: sent along for servers that read them.
        options: of :class:`~llmdistill.wire.transport.Transport`.

    Raises:
        UserError: no endpoint there within ``max_outage_s``, or not that model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        in_flight: int = 32,
        logprobs: Literal["auto", "on", "off"] = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        section: str = "teacher",
        **options: Any,
    ) -> None:
        self.model, self.in_flight, self.section = model, in_flight, section
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._logprobs, self._card = logprobs, dict[str, Any]()
        self._system: str | None = None
        self._probe: Probe | None = None
        self._lock = threading.Lock()  # replicas are admitted by threads of their own
        self.transport = Transport(
            url,
            section=section,
            admit=self._admit,
            in_flight=in_flight,
            keeps_answers=False,
            **{"broken_tries": BROKEN_TRIES, **options},
        )
        try:
            self.transport.wait_ready()
        except BaseException:
            self.transport.close()
            raise
        self._workers = Workers(in_flight, self._answer)

    @property
    def context(self) -> int | None:
        """Tokens of prompt and completion, where the server tells."""
        return self._card.get("max_model_len")

    @property
    def identity(self) -> str:
        """What stands for the weights, which no endpoint tells: its name for them, and where they lie."""
        root = self._card.get("root")
        return f"{NAMED}{self.model}" + (f" {root}" if root and root != self.model else "")

    @property
    def probe(self) -> Probe | None:
        """What else stands for the weights: log-probs of a few fixed prompts. None where it does not give them."""
        return self._probe

    def check_weights(self) -> None:
        """Asks the probes once more: it may have been started anew between two requests, which nothing else tells.

        Raises:
            UserError: it has other weights, or is gone.
        """
        if self._probe is not None:
            self._same_weights(
                lambda body: self.transport.send(Request(CHAT, json_object, body=body, max_bytes=ANSWER_BYTES))
            )

    def submit(self, call: Call) -> Future[Drawn]:
        return self._workers.submit(call)

    def close(self) -> None:
        self._workers.close()
        self.transport.close()

    def _answer(self, call: Call) -> Drawn:
        asked = {
            "model": self.model,
            "max_tokens": call.sampling.max_new_tokens,
            "temperature": call.sampling.temperature,
            "top_p": call.sampling.top_p,
            "seed": call.sampling.seed,
            "n": 1,
            **self._not_openai(call),
            **({"stop": list(call.stop)} if call.stop else {}),
            **self._prompt(call),
        }
        try:
            return self.transport.send(
                Request(
                    CHAT,
                    lambda response: self._parse(response, call),
                    body=json.dumps(asked, ensure_ascii=False).encode("utf-8", "replace"),
                    max_bytes=ANSWER_BYTES + TOKEN_BYTES * call.sampling.max_new_tokens,
                )
            )
        except Refused as refusal:
            if refusal.status in OF_ONE_CALL:
                raise Unanswerable(str(refusal)) from None
            raise

    def _wants_logprobs(self) -> bool:
        return self._logprobs == "on" or (self._logprobs == "auto" and self.context is not None)

    def _not_openai(self, call: Call) -> dict[str, Any]:
        """Settings that OpenAI refuses. Servers of open models would otherwise take them from the checkpoint."""
        logprobs = {"logprobs": True} if self._wants_logprobs() else {}
        top_k = call.sampling.top_k
        if self.context is None:
            return {**logprobs, **({"top_k": top_k} if top_k else {})}
        ids = {"return_token_ids": True} if logprobs else {}
        return {**logprobs, **ids, "top_k": top_k, "min_p": 0.0, "repetition_penalty": 1.0}

    def _prompt(self, call: Call) -> dict[str, Any]:
        messages, extra = list(call.messages), dict[str, Any]()
        if call.prefix:
            messages.append({"role": "assistant", "content": call.prefix})
            extra = {"continue_final_message": True, "add_generation_prompt": False}
        if self.chat_template_kwargs:
            extra["chat_template_kwargs"] = self.chat_template_kwargs
        return {"messages": messages, **extra}

    def _parse(self, response: httpx.Response, call: Call) -> Drawn:
        answer = json_object(response)
        (choice,) = answer["choices"]
        self._same_system(answer.get("system_fingerprint"))
        text = choice["message"].get("content") or ""
        # a server that parses reasoning hands it over apart: put back, so that it is trained on as thinking
        if thoughts := choice["message"].get("reasoning_content") or choice["message"].get("reasoning"):
            closed = bool(text) or choice["finish_reason"] == "stop"
            text = f"<think>{thoughts}</think>{text}" if closed else f"<think>{thoughts}"
        if not isinstance(text, str) or not isinstance(choice.get("finish_reason"), str):
            raise ValueError("a choice without text or without finish_reason")
        text = text.encode("utf-8", "replace").decode()  # half a character is none
        text, by_itself, _ = ended(text, choice["finish_reason"], call.stop)
        usage = answer.get("usage") or {}
        ids, logprobs = _tokens(choice)
        prompt_ids = answer.get("prompt_token_ids") if ids is not None else None
        most = call.sampling.max_new_tokens
        tokens = int(usage.get("completion_tokens") or len(ids or logprobs or ()))
        if ids is not None and len(ids) > most:
            raise ValueError(f"{len(ids)} tokens; at most {most} were asked for")
        return Drawn(
            text,
            "stop" if by_itself else "length",
            tokens,
            int(usage.get("prompt_tokens") or len(prompt_ids or ())),
            prompt_ids=prompt_ids,
            ids=ids,
            logprobs=logprobs,
            logprobs_of="model" if logprobs is not None else None,  # of OpenAI's protocol they always are
        )

    def _same_system(self, found: Any) -> None:
        """Of an endpoint that tells which system it is: another one may be other weights."""
        if not isinstance(found, str) or not found:
            return
        if self._system is None:
            self._system = found
        elif self._system != found:
            raise UserError(
                f"{self.section} {', '.join(self.transport.urls)} was system {self._system!r} and is now {found!r}: "
                "the model behind it has changed. Fix: what is written stands; another output for the new model."
            )

    def _admit(self, get: Get) -> None:
        """Takes the model's card at the first replica, and what it says to the probes, and compares every later one, or
        a restart, with it. A card's ``created`` is no sign: vLLM's is the time of the question."""
        cards = {str(card["id"]): card for card in json_object(get(MODELS)).get("data", [])}
        self.model = self.model or next(iter(cards), "")
        if self.model not in cards:
            raise UserError(
                f"{self.section}.url serves {', '.join(cards) or 'no model'}, not {self.model!r}. "
                "Fix: one of these names, or none for the first."
            )
        card = {name: cards[self.model].get(name) for name in ("id", "root", "max_model_len")}
        for name, value in card.items():
            if self._card and value != self._card.get(name):
                raise UserError(
                    f"{self.section} {', '.join(self.transport.urls)}: {name} was {self._card.get(name)!r} and is now "
                    f"{value!r}. Fix: serve one model everywhere, then the same command again."
                )
        self._card = card
        if self._logprobs != "off":
            self._same_weights(lambda body: json_object(get(CHAT, body)))

    def _same_weights(self, ask: Callable[[bytes], Mapping[str, Any]]) -> None:
        """Takes what the endpoint says to the probes, and compares every later word, and that of its replicas, with it.

        Raises:
            UserError: they are of other weights.
        """
        more = {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}
        try:
            answers = [read_answer(ask(body(self.model, prompt, more))) for prompt in PROMPTS]
        except Refused:  # the calls themselves will say whether it refuses all
            return
        except Failed as failure:
            if failure.broken:  # by log-probs that it has not learnt to give
                return
            raise
        told = [answer for answer in answers if answer is not None]
        if len(told) < len(PROMPTS):
            return
        now = Probe([tokens for tokens, _ in told], [logprobs for _, logprobs in told])
        with self._lock:
            self._probe = then = self._probe or now
        if other := then.other(now):
            raise UserError(
                f"{self.section} {', '.join(self.transport.urls)} has other weights than before under the name "
                f"{self.model!r}: {other}. Fix: the weights of before everywhere, or another output for these."
            )


def _tokens(choice: Mapping[str, Any]) -> tuple[list[int] | None, list[float] | None]:
    """Ids and log-probs of a choice, where it has them, as many of the one as of the other."""
    listed = (choice.get("logprobs") or {}).get("content")
    logprobs = None if listed is None else [float(entry["logprob"]) for entry in listed]
    ids = choice.get("token_ids")
    if ids is not None and not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError("token_ids holds something that is no id")
    if logprobs is not None and not all(x <= SLACK for x in logprobs):  # a NaN is not
        raise ValueError("a log-prob is positive or not a number")
    if ids is not None and logprobs is not None and len(ids) != len(logprobs):
        raise ValueError(f"{len(ids)} ids and {len(logprobs)} log-probs")
    return ids, logprobs
