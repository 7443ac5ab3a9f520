"""The text on the terminal while it is written: known words stand, masked ones are blocks."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

MASKED = "░"


class TerminalStreamer:
    """Shows the first completion of a batch after every step of :func:`~llmdistill.diffusion.sampling.generate`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console | None = None) -> None:
        self.tokenizer, self.live = tokenizer, Live(console=console, auto_refresh=False)

    def put(self, ids: Tensor, masked: Tensor) -> None:
        """ids, masked [B, N] of the completion."""
        if not self.live.is_started:
            self.live.start()
        self.live.update(Text(self.text(ids[0].tolist(), masked[0].tolist())), refresh=True)

    def text(self, ids: list[int], masked: list[bool]) -> str:
        """Runs of known tokens are decoded together, so that characters of several tokens are whole."""
        shown, run = "", list[int]()
        for token, hidden in zip([*ids, 0], [*masked, True], strict=True):
            if hidden:
                shown += str(self.tokenizer.decode(run)) + MASKED
                run = []
            else:
                run.append(token)
        return shown[: -len(MASKED)]

    def end(self) -> None:
        self.live.stop()
