"""What of a completion is the answer's text: no thinking, no other channels, nothing behind the end of the turn."""

from __future__ import annotations

import re

_THOUGHT = r"think|thinking|thought|thoughts|reasoning|scratchpad|seed:think"
_CLOSED = re.compile(
    rf"</(?:{_THOUGHT})>|<\|end_of_thought\|>|<\|/think\|>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>", re.I
)
_OPENED = re.compile(
    rf"<(?:{_THOUGHT})>|<\|begin_of_thought\|>|<\|think\|>|\[THINK\]|◁think▷|<\|channel\|>analysis", re.I
)
_LEADING = re.compile(
    r"(?:\s|<\|start_header_id\|>\w{0,20}<\|end_header_id\|>|<\|(?:im_start|start)\|>(?:assistant)?|<\|assistant\|>"
    r"|<start_of_turn>(?:model)?|<bos>|<s>|\[/INST\]|<\|begin_of_text\|>|<\|begin_of_solution\|>)+"
)
_END = re.compile(
    r"<\|[A-Za-z_/▁ ]{2,30}\|>|</s>|<｜[^｜<>\n]{2,30}｜>|<(?:end_of_turn|start_of_turn|eos|pad)>|\[/?INST\]|\[END\]"
    r"|^(?:Human|User|### ?(?:User|Instruction|Human)) ?:|(?<=\s)(?:USER|HUMAN) ?:", re.M
)  # fmt: skip
# A base model goes on with the next question of its own, behind an answer to the one that it was asked.
_NEXT_QUESTION = re.compile(r"\n[ \t*_#]{0,6}(?:Question|Problem|Exercise|Q)(?: ?\d{1,4})?[*_]{0,2} ?[:.]")
_ANSWERED = re.compile(r"\\boxed|####|\banswer\b[*_ \t]{0,4}(?:is\b|:)|^[ \t]{0,9}A ?:", re.I | re.M)


def spoken(text: str) -> str | None:
    """The text behind the thinking and before the end of the turn; None of a draft whose thinking never ends."""
    closed = max(_CLOSED.finditer(text), key=lambda match: match.end(), default=None)
    if closed is None and _OPENED.search(text):
        return None
    text = text[closed.end() :] if closed else text
    leading = _LEADING.match(text)
    text = text[leading.end() :] if leading else text
    end = _END.search(text)
    text = text[: end.start()] if end and text[: end.start()].strip() else text
    following = _NEXT_QUESTION.search(text)
    answered = _ANSWERED.search(text) if following else None
    return text[: following.start()] if following and answered and answered.end() <= following.start() else text
