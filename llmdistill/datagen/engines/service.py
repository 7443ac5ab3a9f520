"""The teacher-rollout service (``llmdistill serve``). Answers of other weights than the first are refused by it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmdistill.datagen.calls import Call, Drawn, sampled_from
from llmdistill.datagen.engines.base import Reader, Workers, ended
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.texts.rollout import Prompt


class ServiceEngine:
    """Args as of the other engines; ``tokenizer``: of the model it serves."""

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        in_flight: int = 32,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.in_flight = in_flight
        self.teacher = RemoteTeacher(url, tokenizer=tokenizer, in_flight=in_flight, **options)
        self.reader = Reader(tokenizer, self.teacher.info().context_length, chat_template_kwargs)
        self._workers = Workers(in_flight, self._answer)

    def submit(self, call: Call) -> Future[Drawn]:
        return self._workers.submit(call)

    def close(self) -> None:
        self._workers.close()
        self.teacher.close()

    def _answer(self, call: Call) -> Drawn:
        text, ids, opened = self.reader.read(call)
        drawn = self.teacher.generate([Prompt(ids, text)], call.sampling)
        mask = drawn.completion_mask[0]
        found = drawn.input_ids[0][mask].tolist()
        logprobs = None if drawn.behavior_logprobs is None else drawn.behavior_logprobs[0][mask].tolist()
        said, by_itself, cut = ended(self.reader.text(found), str(drawn.finish[0]), call.stop)
        of = sampled_from(call.sampling) if logprobs is not None else None
        if cut:  # the ids go on behind the text
            return Drawn(opened + said, "stop", len(found), len(ids), len(opened))
        finish = "stop" if by_itself else "length"
        return Drawn(opened + said, finish, len(found), len(ids), len(opened), ids, found, logprobs, of)  # type: ignore[arg-type]
