"""Where one text ends and the next begins, in tokens.

A tokenizer is a function of whole texts: what stands before decides how a text is split, a SentencePiece model puts a
blank before the first word of all, and some add a bos in front and an eos behind. So a completion is never tokenised
alone: it is what the joined text has behind the prompt's tokens.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", ".", "a", "0")  # tried in front of a text that must not be the first


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Ids of a text that more will stand behind.

    With ``special``, what the tokenizer puts in front (a bos) unless the text has it already, and never what it puts
    behind: an eos there would say that the text is over.
    """
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not special:
        return plain
    ids = list(tokenizer(text)["input_ids"])
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            front = ids[:start]
            return plain if plain[:start] == front else front + plain
    return ids


def behind(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], text: str, *, special: bool
) -> tuple[list[int], bool]:
    """Ids of ``text`` behind ``prompt``, and whether the joined text has the very tokens of the prompt in front.

    Where it has not, a token reaches over the seam, which no completion of the prompt's tokens can; then the text's own
    tokens are taken, as they are when it is not the first of all.

    Args:
        prompt_ids: of :func:`text_ids` of the prompt.
        special: as there.
    """
    front, ids = _front(tokenizer, prompt, prompt_ids, text, special)
    return ids, front is prompt


def behind_with_offsets(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], text: str, *, special: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """As :func:`behind`; and of every id the first and the last + 1 character of ``text`` that it stands for."""
    front, ids = _front(tokenizer, prompt, prompt_ids, text, special)
    encoded = tokenizer(front + text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"][len(encoded["input_ids"]) - len(ids) :]
    return ids, [(max(a - len(front), 0), max(b - len(front), 0)) for a, b in offsets]


def _front(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], text: str, special: bool
) -> tuple[str, list[int]]:
    """What ``text`` is tokenised behind (the prompt, or where their tokens do not meet something else), and its ids."""
    joined = text_ids(tokenizer, prompt + text, special=special)
    if joined[: len(prompt_ids)] == prompt_ids:
        return prompt, joined[len(prompt_ids) :]
    return inner(tokenizer, text)


def inner(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, list[int]]:
    """Ids of a text that is not the first of all, and what it was tokenised behind: "" where nothing would do."""
    for anchor in ANCHORS:
        front = text_ids(tokenizer, anchor, special=False)
        both = text_ids(tokenizer, anchor + text, special=False)
        if both[: len(front)] == front and tokenizer.decode(both) == f"{tokenizer.decode(front)}{text}":
            return anchor, both[len(front) :]
    return "", text_ids(tokenizer, text, special=False)
