"""An engine that is made when it is first needed: for runs that sample from the student only now and then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from llmdistill.rollouts.engine import RolloutEngine
from llmdistill.texts.rollout import Prompt, Rollout, Sampling


class LazyEngine:
    """Implements :class:`~llmdistill.rollouts.engine.RolloutEngine` over one that ``make`` returns.

    A run on the dataset's text samples for its held-out measurements alone. Until then an engine's memory and start-up,
    and in between its pushes, would be paid for nothing: ``make`` is called by the first :meth:`generate`, and weights
    are pushed by the next one after a :meth:`sync`. Those are the weights of that moment; whoever wants to sample from
    older ones (``push_every``) uses the engine itself.
    """

    def __init__(self, make: Callable[[], RolloutEngine]) -> None:
        self.make = make
        self.engine: RolloutEngine | None = None
        self._to_push: tuple[nn.Module, int] | None = None

    def sync(self, model: nn.Module, policy_version: int) -> None:
        self._to_push = model, policy_version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """As the engine's own.

        Raises:
            UserError: the engine cannot be made, or whatever it raises.
        """
        if self.engine is None:
            assert self._to_push is not None, "sync() comes before generate()"
            self.engine = self.make()
        if self._to_push is not None:
            self.engine.sync(*self._to_push)
            self._to_push = None
        return self.engine.generate(prompts, sampling)

    def close(self) -> None:
        self._to_push = None
        if self.engine is not None:
            self.engine.close()
