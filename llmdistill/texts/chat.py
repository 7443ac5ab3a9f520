"""A chat template at work: conversations become text, and an answer is what the template writes behind the prompt.

Templates differ in all that a conversation can have. What one cannot do is done around it where the meaning is kept (a
system message joins the first user message where there is no such role), and noted; else it is refused. The source of
an answer is always the template: its header, its spaces, its end of turn. Where the answered conversation does not
begin with the prompt that generation starts from, the answer's own words are put behind that prompt, and that is noted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.texts.messages import Message
from llmdistill.texts.seam import text_ids

PROBE = "Quince 7"  # words that no template has of its own
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

MERGED = "the chat template has no system role; the system message stands at the beginning of the first user message"
REASONING = "reasoning_content"


@dataclass(frozen=True)
class Answered:
    """A prompt as generation reads it, and the answer behind it up to the end of its turn."""

    prompt: str
    completion: str
    closed: bool  # it ends with a token that ends a turn; else the eos is still to come


@dataclass(frozen=True)
class Closing:
    """What a template writes behind an assistant message's content."""

    written: str
    kept: str  # of it, up to the end of turn: what stands behind that is never generated
    token: str | None  # that ends a turn; None where the template has none


class ChatTemplate:
    """The chat template of a tokenizer, with the settings of a recipe.

    Args:
        system_prompt: for conversations without a system message; empty: none.
        kwargs: what the template reads beside the messages (``enable_thinking``, ``date_string``).
        note: called with what was done around the template, for every conversation.

    Raises:
        UserError: ``kwargs`` that no template of the tokenizer reads.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str = "",
        kwargs: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self.kwargs, self.note = dict(kwargs or {}), note
        if unread := [name for name in self.kwargs if self.source and not reads(tokenizer, name)]:
            raise UserError(
                f"data.chat_template_kwargs has {unread[0]!r}, which the tokenizer's chat template does not read. "
                "Fix: leave it out, or correct its name."
            )

    @property
    def source(self) -> str:
        """All templates of the tokenizer as one text; empty without any."""
        return _source(self.tokenizer)

    # ---------------------------------------------------------------- conversations

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The conversation with what opens the assistant's next turn.

        Raises:
            UserError: no template, or one that refuses these messages.
        """
        said = self._prepared(messages)
        text = self._rendered(said, tools, add_generation_prompt=True)
        if lost := [m for m in said if m["role"] not in ("assistant", "tool") and m["content"].strip() not in text]:
            self.note(f"the chat template changes or leaves out what a message of role {lost[0]['role']!r} says")
        if tools and "tools" not in self.source:
            self.note("the chat template writes no tools, and rows have some")
        return text

    def answered(
        self,
        messages: Sequence[Message],
        answer: Message,
        tools: Sequence[Any] | None = None,
        *,
        prompt: str | None = None,
    ) -> Answered:
        """The prompt and the answer behind it.

        ``prompt``: what :meth:`prompt` has made of the messages, where that is known.

        Raises:
            UserError: as :meth:`prompt`; or thoughts or tool calls of the answer that the template does not write.
        """
        answer, prompt = self._open(answer), self.prompt(messages, tools) if prompt is None else prompt
        if self.closing.kept and self.closing.token is None:
            self.note(
                f"the chat template ends a turn with {self.closing.kept!r}, which is no token; the eos follows it"
            )
        try:
            whole = self._rendered([*self._prepared(messages), answer], tools, add_generation_prompt=False)
        except UserError:  # some write conversations to be answered only
            whole = ""
        rest = whole[len(prompt) :]
        if whole.startswith(prompt) and _holds(rest, answer["content"]):
            _check_written(rest, answer)
            return Answered(prompt, *self._until_end_of_turn(rest))
        if answer.get("tool_calls"):
            raise UserError(
                "the chat template writes an answered turn otherwise than it opens one for generation, so it is not "
                "known how the answer's tool calls stand behind the prompt. Fix: the calls as text in content."
            )
        self.note(
            "the chat template writes an answered turn otherwise than it opens one for generation (or drops part of "
            "the answer); completions are the answers' own words behind the prompt, with the template's end of turn"
        )
        said = _behind(prompt[len(commonprefix([prompt, whole])) :], _with_thoughts(answer))
        return Answered(prompt, said + self.closing.kept, self.closing.token is not None)

    def assistant_tokens(
        self, messages: Sequence[Message], answer: Message, tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]] | None:
        """Ids of the answered conversation and which are the assistant's, by the template's generation tags.

        None for a template without tags, or a tokenizer that cannot tell where its tokens stand.
        """
        if not GENERATION_TAG.search(self.source) or not self.tokenizer.is_fast:
            return None
        encoded: Any = self.tokenizer.apply_chat_template(
            [self._in_form(m) for m in [*self._prepared(messages), self._open(answer)]],
            tools=list(tools) if tools else None,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self.kwargs,
        )
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

    # ---------------------------------------------------------------- what the template can do

    @cached_property
    def closing(self) -> Closing:
        """What it writes behind an answer."""
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        text = self._probed([self._in_form(m) for m in probe], add_generation_prompt=False)
        if text is None or PROBE not in text:
            return Closing("", "", None)
        written = text.rpartition(PROBE)[2]
        run = _first_run(written, self._added_tokens)
        if run is None or not self._is_token(run[1]):
            return Closing(written, written.rstrip(), None)
        return Closing(written, written[: run[0]], run[1])

    @cached_property
    def has_system_role(self) -> bool:
        """Whether a system message is written at all."""
        messages = [{"role": "system", "content": PROBE}, {"role": "user", "content": "?"}]
        text = self._probed([self._in_form(m) for m in messages], add_generation_prompt=True)
        return text is not None and PROBE in text

    @cached_property
    def wants_parts(self) -> bool:
        """Whether it reads content as a list of parts and not as text."""
        message: Message = {"role": "user", "content": PROBE}
        forms = ([message], [{**message, "content": [{"type": "text", "text": PROBE}]}])
        text, parts = (self._probed(form, add_generation_prompt=True) for form in forms)
        return not (text and PROBE in text) and bool(parts and PROBE in parts)

    def _is_token(self, text: str) -> bool:
        """Whether it is one id, and not a word that a template was taken over with from another tokenizer."""
        return len(text_ids(self.tokenizer, text, special=False)) == 1

    @cached_property
    def _added_tokens(self) -> list[str]:
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        return sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)

    # ---------------------------------------------------------------- rendering

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """With the system prompt, and without a system message where the template knows none."""
        said = list(messages)
        if self.system_prompt and said[0]["role"] != "system":
            said = [{"role": "system", "content": self.system_prompt}, *said]
        if said[0]["role"] == "system" and not self.has_system_role:
            self.note(MERGED)
            system, rest = said[0]["content"], said[1:]
            if rest and rest[0]["role"] == "user":
                both = [text for text in (system, rest[0]["content"]) if text]
                said = [{**rest[0], "content": "\n\n".join(both)}, *rest[1:]]
            else:
                said = [{"role": "user", "content": system}, *rest]
        return said

    def _in_form(self, message: Message) -> Message:
        if not self.wants_parts:
            return message
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool
    ) -> str:
        if not self.source:
            raise UserError(
                "the student's tokenizer has no chat template, and the prompts are chat messages. "
                "Fix: set tokenizer.chat_template and save it beside the student, or give prompts as strings."
            )
        said = [self._in_form(m) for m in messages]
        try:
            return self._applied(said, tools, add_generation_prompt)
        except Exception as error:  # templates are programs and raise what they like
            try:  # some write the arguments of a tool call as the text that they are in OpenAI's API
                if any(m.get("tool_calls") for m in said):
                    return self._applied([_with_text_arguments(m) for m in said], tools, add_generation_prompt)
            except Exception:  # the first reason is the one that counts
                pass
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(
                f"the chat template refuses messages of the roles {roles}: {reason}. "
                "Fix: mend the row, or the template."
            ) from None

    def _probed(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str | None:
        try:
            return self._applied(messages, None, add_generation_prompt)
        except Exception:  # what a probe is for
            return None

    def _applied(self, messages: Sequence[Message], tools: Sequence[Any] | None, generation: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=generation,
                **self.kwargs,
            )
        )

    # ---------------------------------------------------------------- answers

    def _open(self, answer: Message) -> Message:
        """The answer without the end of turn that its text may hold already: the template writes one."""
        ends = [end for end in (self.tokenizer.eos_token, self.closing.token, self.closing.kept.strip()) if end]
        content = answer["content"]
        while end := next((end for end in ends if content.rstrip().endswith(end)), None):
            content = content.rstrip()[: -len(end)]
        return {**answer, "content": content}

    def _until_end_of_turn(self, rest: str) -> tuple[str, bool]:
        closing = self.closing
        if closing.token is not None and rest.endswith(closing.written):
            return rest[: len(rest) - len(closing.written)] + closing.kept, True
        for token in self.tokenizer.all_special_tokens:  # tool calls may end otherwise than words
            if rest.rstrip().endswith(token) and self._is_token(token):
                return rest.rstrip(), True
        if closing.written and rest.endswith(closing.written):
            return rest[: len(rest) - len(closing.written)] + closing.kept, False
        return rest, False


def _check_written(text: str, answer: Message) -> None:
    """Raises UserError where ``text`` lacks what the answer holds beside its content."""
    thoughts = answer.get(REASONING)
    if thoughts and not _holds(text, thoughts):
        raise UserError(
            f"the chat template does not write the answer's {REASONING}. Fix: put it into content, between the marks "
            "that the student thinks in, or remove it."
        )
    for call in answer.get("tool_calls") or ():
        name = str((call.get("function") or call).get("name", ""))
        if name not in text:
            raise UserError(
                f"the chat template does not write the answer's tool call {name!r}. Fix: a template that does, or the "
                "call as text in content."
            )


def reads(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether a chat template of the tokenizer reads an argument of that name."""
    return re.search(rf"\b{re.escape(name)}\b", _source(tokenizer)) is not None


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _first_run(text: str, tokens: Sequence[str]) -> tuple[int, str] | None:
    """End of the first run of neighbouring ``tokens`` in ``text``, and the last of them."""
    any_of = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
    if (found := any_of.search(text)) is None:
        return None
    while (following := any_of.match(text, found.end())) is not None:
        found = following
    return found.end(), found[0]


def _holds(text: str, part: str) -> bool:
    """Whether ``part`` is in ``text``, blanks apart: templates trim."""
    return "".join(part.split()) in "".join(text.split())


def _with_thoughts(answer: Message) -> str:
    thoughts = answer.get(REASONING)
    return f"<think>\n{thoughts}\n</think>\n\n{answer['content']}" if thoughts else str(answer["content"])


def _behind(opened: str, said: str) -> str:
    """``said`` without what the generation prompt has ``opened`` already, as a mark that thinking begins."""
    if not opened.strip() or not said.lstrip().startswith(opened.strip()):
        return said
    said = said.lstrip()[len(opened.strip()) :]
    return said.lstrip() if opened != opened.rstrip() else said


def _with_text_arguments(message: Message) -> Message:
    def changed(call: Any) -> Any:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str | None):
            function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {**call, "function": function} if "function" in call else function

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [changed(call) for call in calls]} if calls else message
