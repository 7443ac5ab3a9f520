"""What vLLM's worker says of a prompt stays arrays on its way to whoever asked.

vLLM's output processor makes four Python objects of every listed log-prob, on the event loop: 44,500 positions a second
at 64 listed tokens, whatever the engine does. For requests that say so (:func:`asked_for`) it only keeps the tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FIRST, HIDDEN = "llmdistill_first", "llmdistill_hidden"  # in ``SamplingParams.extra_args``
_FITTED = "llmdistill_keeps_arrays"


def asked_for(first: int, hidden: bool = False) -> dict[str, Any]:
    """``extra_args`` of a request whose prompt is scored from row ``first`` on; row i speaks of token i + 1.

    Args:
        hidden: final hidden states instead of log-probs.
    """
    return {FIRST: first, HIDDEN: hidden}


def is_asked(params: Any) -> bool:
    return params is not None and FIRST in (params.extra_args or {})


class PromptArrays:
    """Stands where vLLM's lists would: rows of a prompt, in parts as they came. The last row is of its last token."""

    def __init__(self) -> None:
        self.parts: list[Any] = []  # vLLM's LogprobsTensors

    def token_ids(self, length: int, positions: NDArray[np.int64]) -> Tensor:
        """[n, 1 + K] int32: the token itself and the listed ones, of a prompt of ``length`` tokens."""
        return self._rows("logprob_token_ids", length, positions).int()

    def values(self, length: int, positions: NDArray[np.int64]) -> Tensor:
        """[n, 1 + K] float32 log-probs; [n, H] hidden states in the model's dtype where these were asked for."""
        return self._rows("logprobs", length, positions)

    def _rows(self, name: str, length: int, positions: NDArray[np.int64]) -> Tensor:
        found = [getattr(part, name) for part in self.parts]
        rows = found[0] if len(found) == 1 else torch.cat(found)
        at = np.asarray(positions) - (length - len(rows))  # the first row is of token length - len(rows)
        if len(at) and at[-1] - at[0] + 1 == len(at):  # one stretch: no copy
            return rows[int(at[0]) : int(at[-1]) + 1]
        return rows[torch.from_numpy(at)]


def keep_arrays() -> None:
    """Fits the output processors of this process; requests that do not ask are treated as ever."""
    from vllm.v1.engine import output_processor
    from vllm.v1.engine.logprobs import LogprobsProcessor

    if getattr(output_processor.LogprobsProcessor, _FITTED, False):
        return

    class Fitted(LogprobsProcessor):
        llmdistill_keeps_arrays = True

        @classmethod
        def from_new_request(cls, tokenizer: Any, request: Any) -> Any:
            made: Any = super().from_new_request(tokenizer, request)
            if is_asked(request.sampling_params) and made.prompt_logprobs is not None:
                made.prompt_logprobs = PromptArrays()
            return made

        def _update_prompt_logprobs(self, prompt_logprobs_tensors: Any) -> None:
            kept: Any = self.prompt_logprobs
            if isinstance(kept, PromptArrays):
                kept.parts.append(prompt_logprobs_tensors)
            else:
                super()._update_prompt_logprobs(prompt_logprobs_tensors)

    output_processor.LogprobsProcessor = Fitted  # type: ignore[misc]
