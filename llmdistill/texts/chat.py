"""A chat template at work: conversations become text, and an answer is what the template writes behind the prompt.

Templates differ in all that a conversation can have. What one cannot do is done around it where the meaning is kept (a
system message joins the first user message where there is no such role), and noted; else it is refused. The source of
an answer is always the template: its header, its spaces, its end of turn. Where the answered conversation does not
begin with the prompt that generation starts from, the answer's own words are put behind that prompt, and that is noted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.texts import calls, thoughts
from llmdistill.texts.messages import Message
from llmdistill.texts.seam import text_ids
from llmdistill.texts.thoughts import REASONING

PROBE = "Quince 7"  # words that no template has of its own
DEVELOPER = re.compile(r"['\"]developer['\"]")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

MERGED = "the chat template has no system role; the system message stands at the beginning of the first user message"
OWN_WORDS = (
    "the chat template writes an answered turn otherwise than it opens one for generation (or drops part of the "
    "answer); completions are the answers' own words behind the prompt, with the template's end of turn"
)


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
        if marked := [t for m in said if m["role"] != "assistant" for t in self._special_tokens if t in m["content"]]:
            self.note(f"messages hold {marked[0]!r} in their words, which is read as the mark that it looks like")
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
        if self.closing.token is not None and self.closing.token in answer["content"]:
            self.note(f"answers hold the end of turn, {self.closing.token!r}, in their words and go on behind it")
        if self.closing.kept and self.closing.token is None:
            self.note(
                f"the chat template ends a turn with {self.closing.kept!r}, which is no token; the eos follows it"
            )
        if thoughts.closed(prompt) and thoughts.has_thoughts(answer):
            raise UserError(
                "the answer has thoughts, and the prompt ends with empty ones: the student is told not to think. Fix: "
                "remove them from the row, or data.chat_template_kwargs without enable_thinking false."
            )
        whole, unwritten = "", False
        for form in self._forms_of(answer):
            try:
                whole = self._rendered([*self._prepared(messages), form], tools, add_generation_prompt=False)
            except calls.NotWritten:
                raise
            except UserError:  # some write conversations to be answered only
                continue
            if (rest := _behind_prompt(prompt, whole, form)) is None:
                continue
            if not form.get(REASONING) or _holds(rest, form[REASONING]):
                return Answered(prompt, *self._until_end_of_turn(rest))
            unwritten = True
        if unwritten:
            raise UserError(
                f"the chat template does not write the answer's {REASONING}. Fix: put it into content, between the "
                "marks that the student thinks in, or remove it."
            )
        if answer.get("tool_calls"):
            raise UserError(
                "the chat template writes an answered turn otherwise than it opens one for generation, so it is not "
                "known how the answer's tool calls stand behind the prompt. Fix: the calls as text in content."
            )
        self.note(OWN_WORDS)
        said = _own_words(prompt, prompt[len(commonprefix([prompt, whole])) :], answer)
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
    def has_content(self) -> bool:
        """Whether anything of what a user says is written."""
        message: Message = {"role": "user", "content": PROBE}
        text = self._probed([self._in_form(message)], add_generation_prompt=True)
        return text is None or PROBE in text

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
        said = [self._thoughts_apart(message) for message in messages]
        if said[0]["role"] == "developer" and not DEVELOPER.search(self.source):  # OpenAI's newer name
            said[0] = {**said[0], "role": "system"}
        if self.system_prompt and said[0]["role"] not in ("system", "developer"):
            said = [{"role": "system", "content": self.system_prompt}, *said]
        if said[0]["role"] == "system" and not self.has_system_role:
            self.note(MERGED)
            first = next((i for i, m in enumerate(said) if m["role"] != "system"), len(said))
            system, rest = "\n\n".join(m["content"] for m in said[:first] if m["content"]), said[first:]
            if rest and rest[0]["role"] == "user":
                both = [text for text in (system, rest[0]["content"]) if text]
                said = [{**rest[0], "content": "\n\n".join(both)}, *rest[1:]]
            else:
                said = [{"role": "user", "content": system}, *rest]
        return said

    def _in_form(self, message: Message) -> Message:
        if message.get(REASONING):
            message = {**message, **dict.fromkeys(self._thoughts_read, message[REASONING])}
        if not self.wants_parts or message["content"] is None:
            return message
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    @cached_property
    def _thoughts_read(self) -> list[str]:
        return thoughts.names_read(self.source)

    def _thoughts_apart(self, message: Message) -> Message:
        """An assistant's message with its thoughts apart, for a template that knows no marks within the words."""
        if message["role"] != "assistant" or not self._thoughts_read or thoughts.marks_written(self.source):
            return message
        return thoughts.apart(message) or message

    def _forms_of(self, answer: Message) -> list[Message]:
        """The answer as it is, and with its thoughts apart where the template reads them so."""
        parted = thoughts.apart(answer) if self._thoughts_read else None
        if parted is None:
            return [answer]
        return [answer, parted] if thoughts.marks_written(self.source) else [parted, answer]

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool
    ) -> str:
        if not self.source and type(self.tokenizer).__name__ == "MistralCommonBackend":
            raise UserError(
                "the student's tokenizer is mistral-common's, which writes chats by code and has no chat template to "
                "read. Fix: --student.tokenizer FOLDER with a tokenizer.json and a chat template, or prompts as "
                "strings."
            )
        if not self.source:
            raise UserError(
                "the student's tokenizer has no chat template, and the prompts are chat messages. "
                "Fix: set tokenizer.chat_template and save it beside the student, or give prompts as strings."
            )
        first: Exception | None = None
        for form in calls.forms() if calls.uses_tools(messages) else (lambda message: message,):
            try:
                text = self._applied([self._in_form(form(m)) for m in messages], tools, add_generation_prompt)
                self._check_tools_written(form, messages, tools, add_generation_prompt)
                return text
            except Exception as error:  # templates are programs and raise what they like
                first = first or error
        if isinstance(first, calls.NotWritten):
            raise first
        reason = (str(first).strip() or type(first).__name__).splitlines()[0]
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(
            f"the chat template refuses messages of the roles {roles}: {reason}. Fix: mend the row, or the template."
        ) from None

    def _check_tools_written(
        self, form: calls.Form, messages: Sequence[Message], tools: Sequence[Any] | None, generation: bool
    ) -> None:
        """Raises NotWritten where a call, or what a tool answered, is not in the text."""
        changed, sought = calls.probe(messages)
        text = self._applied([self._in_form(form(m)) for m in changed], tools, generation) if sought else ""
        if left_out := [what for words, what in sought if words not in text]:
            raise calls.NotWritten(
                f"the chat template does not write {left_out[0]}. Fix: a template that does, or the call as text in "
                "content and its result as a user's message."
            )

    def _probed(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str | None:
        if not self.source:
            return None
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
        for token in self._special_tokens:  # tool calls may end otherwise than words
            if rest.rstrip().endswith(token) and self._is_token(token):
                return rest.rstrip(), True
        if closing.written and rest.endswith(closing.written):
            return rest[: len(rest) - len(closing.written)] + closing.kept, False
        return rest, False

    @cached_property
    def _special_tokens(self) -> list[str]:
        """All of them: transformers lists those only that have a name."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return [*self.tokenizer.all_special_tokens, *added]


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


def _behind_prompt(prompt: str, whole: str, answer: Message) -> str | None:
    """What a template has written behind a prompt; None where it does not begin with the prompt, or where it is not
    what the answer says."""
    opens = thoughts.opened(prompt)
    begun = prompt.rstrip() if opens and not whole.startswith(prompt) else prompt
    rest = whole[len(begun) :]
    said = (opens[0] if opens else "") + rest
    if not whole.startswith(begun) or not _holds(said, answer["content"] or ""):
        return None
    # Where the answer has marks of its own, a template that does not know them may write a second block in front.
    of_its_own = thoughts.has_thoughts(answer) and not answer.get(REASONING)
    return None if of_its_own and thoughts.blocks(said) != thoughts.blocks(answer["content"]) else rest


def _own_words(prompt: str, opened: str, answer: Message) -> str:
    """The answer's words without what the prompt has ``opened`` already, as a mark that thinking begins; thoughts that
    the prompt has opened and the answer does not have end at once."""
    said, opens = thoughts.within(answer), thoughts.opened(prompt)
    opened = opens[0] + "\n" if opens else opened
    if opened.strip() and said.lstrip().startswith(opened.strip()):
        said = said.lstrip()[len(opened.strip()) :]
        return said.lstrip() if opened != opened.rstrip() else said
    return f"\n{opens[1]}\n\n{said}" if opens and opens[1] not in said else said
