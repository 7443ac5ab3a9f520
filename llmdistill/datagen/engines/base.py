"""What a call is answered by, and how a prompt becomes token ids for those that take ids."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from llmdistill.datagen.calls import Call, Drawn, Unanswerable
from llmdistill.texts.chat import ChatTemplate
from llmdistill.texts.seam import text_ids

THINK = "<think>"


class Engine(Protocol):
    """Answers calls, some at a time.

    Attributes:
        in_flight: calls that are worth being under way together.
    """

    in_flight: int

    def submit(self, call: Call) -> Future[Drawn]:
        """The answer to come. It fails with Unanswerable where no try helps, with UserError where none is left."""
        ...

    def close(self) -> None: ...


class Workers:
    """Daemon threads, not a pool: Ctrl-C has to end the process without waiting for answers that are on their way."""

    def __init__(self, count: int, work: Callable[[Call], Drawn]) -> None:
        self._work = work
        self._calls: queue.SimpleQueue[tuple[Call, Future[Drawn]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Call) -> Future[Drawn]:
        future: Future[Drawn] = Future()
        self._calls.put((call, future))
        return future

    def close(self) -> None:
        for _ in self._threads:
            self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            call, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._work(call))
            except BaseException as error:
                future.set_exception(error)


class Reader:
    """A model's chat template and tokenizer at work: messages and a prefix become what the model reads.

    Args:
        context: tokens that prompt and completion may have together.
        kwargs: what the template reads beside the messages.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: int, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.template = ChatTemplate(tokenizer, kwargs=kwargs)

    def read(self, call: Call) -> tuple[str, list[int], str]:
        """Text and ids of what the model reads, and the thinking tag that the template opened, "" if it did not.

        Raises:
            UserError: no template, or one that refuses the messages.
            Unanswerable: the context leaves no room for ``max_new_tokens``.
        """
        text, opened = self.template.prompt(list(call.messages)), ""
        if text.rstrip().endswith(THINK):
            if call.prefix.startswith(THINK):
                text = text.rstrip().removesuffix(THINK)  # the prefix has it already
            elif not call.prefix:
                opened = f"{THINK}\n"
        text += call.prefix
        ids = text_ids(self.tokenizer, text, special=False)
        if len(ids) + call.sampling.max_new_tokens > self.context:
            raise Unanswerable(
                f"the prompt has {len(ids)} tokens, with max_new_tokens {call.sampling.max_new_tokens} more than the "
                f"context of {self.context}"
            )
        return text, ids, opened

    def text(self, ids: list[int]) -> str:
        """Of a completion. Thinking tags are ordinary tokens in the tokenizers that have them, so they stay."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def ended(text: str, finish: str, stop: tuple[str, ...]) -> tuple[str, bool, bool]:
    """The text before the first stop string, whether it ended by itself, and whether a stop string ended it."""
    ends = [at for word in stop if (at := text.find(word)) >= 0]
    return (text[: min(ends)], True, True) if ends else (text, finish != "length", False)
