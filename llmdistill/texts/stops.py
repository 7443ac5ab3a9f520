"""Strings that end a completion: ``rollouts.stop``.

One meaning for every engine: a completion ends with the token that completes one of the strings in its text. That token
stays: the student drew it, so it is scored and trained on as any other, as in vLLM's ``token_ids`` and in TRL. Nothing
is put behind it, so no end of turn is taught there. Text that is shown or graded ends before the string where its
reader says so (evaluations, the OpenAI protocol). Special tokens are text here, so ``</s>`` may be a string as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError

# A character has at most 4 bytes and a token at least one. Tokenizers of words drop the space before the first token of
# what they decode, and half a character is none: so a few more.
TOKENS_A_CHARACTER, SPARE = 4, 8


class StopStrings:
    """Says whether token ids end in a stop string.

    Args:
        tokenizer: of the ids.
        strings: none of them empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        self.window = TOKENS_A_CHARACTER * max(map(len, self.strings)) + SPARE

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether a string is in the text of the last tokens; asked after each, it is true first where one ends."""
        return self._in(ids[-self.window :])

    def end(self, ids: Sequence[int]) -> int | None:
        """The number of tokens of the completion up to the first that completes a string; None: none does."""
        step = self.window
        for start in range(0, len(ids), step):  # a string lies within two windows
            if self._in(ids[max(start - step, 0) : start + step]):
                for n in range(start + 1, min(start + step, len(ids)) + 1):
                    if self.ends(ids[:n]):
                        return n
        return None

    def _in(self, ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)


def stop_strings(tokenizer: PreTrainedTokenizerBase | None, strings: Sequence[str]) -> StopStrings | None:
    """The stop strings of a call; None where there are none.

    Raises:
        UserError: nobody said which tokenizer writes their text.
    """
    if not strings:
        return None
    if tokenizer is None:
        raise UserError(
            f"rollouts.stop is {list(strings)}, and this engine was given no tokenizer to read its tokens with. Fix: "
            "tokenizer=, of the student."
        )
    return StopStrings(tokenizer, strings)
