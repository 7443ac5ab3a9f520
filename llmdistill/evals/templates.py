"""Prompt templates: named, versioned, hashed. A score without its prompt is not a score.

The wordings are those under which published numbers were made (open-r1, Qwen2.5-Math, DeepSeek-R1's model card, the
GSM8K and EvalPlus harnesses). Changing a word means a new version; the hash of the text goes into every result.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.texts.chat import ChatTemplate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A solved question, written before the one that is asked."""

    question: str
    answer: str


@dataclass(frozen=True)
class Template:
    """What goes around a question.

    Attributes:
        user: with ``{question}`` once; the only placeholder, so braces in it or in a question need no escaping.
        system: system message; empty: none, which leaves a chat template its own default.
        chat: False: ``user`` is continued as plain text, for base models; ``system`` must be empty.
        prefill: the assistant's first words; they are judged with the completion, as its beginning.
        stop: strings that end a completion; cut off with what follows.
        examples: few-shot, each written as the question is, with its answer behind it; in a chat a turn each.
    """

    name: str
    version: int
    user: str
    system: str = ""
    chat: bool = True
    prefill: str = ""
    stop: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        if self.user.count("{question}") != 1:
            raise UserError(
                f"template {self.name!r}: user is {self.user!r}; it needs {{question}} exactly once. Fix: write it in."
            )
        if self.system and not self.chat:
            raise UserError(f"template {self.name!r}: chat is false and system is set. Fix: put it into user.")
        if not all(isinstance(word, str) and word for word in self.stop):
            raise UserError(
                f"template {self.name!r}: stop is {list(self.stop)!r}; it must be a list of words, none empty."
            )
        if self.examples and not self.chat and not self.stop:
            raise UserError(
                f"template {self.name!r}: stop is empty and there are few_shot examples, which a base model goes on "
                "with after its answer. Fix: stop: the words that begin an example (question-answer has them)."
            )

    @property
    def hash(self) -> str:
        """Of everything that reaches the model."""
        content = asdict(self)
        if not self.examples:  # a template without any is what it was before there were examples
            del content["examples"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def messages(self, question: str, system_prompt: str = "") -> list[dict[str, str]]:
        """As chat messages, the prefilled assistant turn left out."""
        said = self.system or system_prompt
        system = [{"role": "system", "content": said}] if said else []
        shown: list[dict[str, str]] = []
        for example in self.examples:
            shown.append({"role": "user", "content": self._asked(example.question)})
            shown.append({"role": "assistant", "content": _answered(self.prefill, example.answer)})
        return [*system, *shown, {"role": "user", "content": self._asked(question)}]

    def _asked(self, question: str) -> str:
        return self.user.replace("{question}", question)

    def _plain(self, question: str) -> str:
        """As one text: every example with its answer, an empty line behind it, then the question."""
        examples = [_answered(self._asked(e.question) + self.prefill, e.answer) + "\n\n" for e in self.examples]
        return "".join(examples) + self._asked(question) + self.prefill

    def render(
        self,
        question: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        thinking: bool | None = None,
        system_prompt: str = "",
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """The prompt as text and as ids.

        A chat template writes its own special tokens, so none are added to it; plain text gets those the tokenizer
        adds by itself (a missing BOS costs some models several nats a token).

        Args:
            thinking: passed on as ``enable_thinking``, which templates that know it (Qwen3's) obey; None: not passed.
            system_prompt: where the template has no system message of its own.
            kwargs: what else the model's chat template reads beside the messages.

        Raises:
            UserError: a chat prompt for a model without chat template, or one whose template refuses it.
        """
        if not self.chat:
            text = self._plain(question)
            return text, list(tokenizer(text)["input_ids"])
        if not tokenizer.chat_template:
            raise UserError(
                f"template {self.name!r} makes a chat and the model has no chat template. "
                "Fix: --template question-answer (a base model's), or a template of your own with chat: false."
            )
        if thinking is not None and not self._heeds_thinking(question, tokenizer):
            raise UserError(
                f"thinking is {'on' if thinking else 'off'} and the model's chat template takes no enable_thinking. "
                "Fix: leave --thinking out."
            )
        told = {**(kwargs or {}), **({} if thinking is None else {"enable_thinking": thinking})}
        text = ChatTemplate(tokenizer, kwargs=told, note=_warn).prompt(self.messages(question, system_prompt))
        text += self.prefill
        return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _heeds_thinking(self, question: str, tokenizer: PreTrainedTokenizerBase) -> bool:
        on, off = (
            tokenizer.apply_chat_template(
                self.messages(question), tokenize=False, add_generation_prompt=True, enable_thinking=value
            )
            for value in (True, False)
        )
        return on != off


def _answered(begun: str, answer: str) -> str:
    """The answer behind what is written already, one space between them where neither has any."""
    gap = " " if begun and not begun[-1].isspace() and not answer[:1].isspace() else ""
    return begun + gap + answer.rstrip()


@cache
def _warn(message: str) -> None:
    """Once, however many questions it holds for."""
    logger.warning(message)


_STEPS = "Please reason step by step, and put your final answer within \\boxed{}."
_FENCE = "```python\n"

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("boxed", 1, f"{{question}}\n{_STEPS}"),
        Template("qwen-math", 1, "{question}", system=_STEPS),
        Template("question-answer", 1, "Question: {question}\nAnswer:", chat=False, stop=("Question:",)),
        Template(
            "choice",
            1,
            "{question}\nPlease reason step by step, and put the letter of the right choice within \\boxed{}.",
        ),
        Template("plain", 1, "{question}"),
        Template(
            "function",
            1,
            "Write a complete, self-contained Python solution of the following problem, in one markdown code block:\n"
            f"{_FENCE}{{question}}\n```",
        ),
        Template(
            "script",
            1,
            "Write a self-contained Python solution of the following problem in one markdown code block.\n\n{question}",
        ),
        Template(
            "stdin",
            1,
            "Write a Python program that solves the following problem. It reads its input from standard input and "
            "prints its output to standard output. Put the whole program into one markdown code block.\n\n{question}",
        ),
        Template(
            "continue",
            1,
            "{question}",
            chat=False,
            stop=("\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "\n```"),
        ),
    )
}


def find_template(given: str | Mapping[str, Any]) -> Template:
    """A template by name, or the one that a suite spells out as a mapping of :class:`Template`'s fields.

    Raises:
        UserError: no template of that name (the known ones are listed), or a mapping that is none.
    """
    if isinstance(given, str):
        if given not in TEMPLATES:
            raise UserError(f"template is {given!r}; it must be one of {', '.join(sorted(TEMPLATES))}, or spelt out.")
        return TEMPLATES[given]
    if not isinstance(given, Mapping):
        raise UserError(f"template is {given!r}; it must be a name or a mapping with user: '...{{question}}...'.")
    known = set(Template.__dataclass_fields__) - {"examples"}  # those are a file
    if unknown := set(given) - known:
        raise UserError(f"template has the unknown key {sorted(unknown)[0]!r}; it takes {', '.join(sorted(known))}.")
    fields = {"name": "custom", "version": 1, **given}
    stop = fields.get("stop") or ()
    for key, kind in (
        ("name", str),
        ("version", int),
        ("user", str),
        ("system", str),
        ("prefill", str),
        ("chat", bool),
    ):
        if key in fields and not isinstance(fields[key], kind):
            raise UserError(f"template.{key} is {fields[key]!r}; it must be {kind.__name__}.")
    if "user" not in fields:
        raise UserError("template has no user text. Fix: user: '{question}' with your words around it.")
    return Template(**{**fields, "stop": (stop,) if isinstance(stop, str) else tuple(stop)})
