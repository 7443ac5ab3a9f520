"""After the first push: whether an engine has the student's weights, by what both say of a few tokens."""

from __future__ import annotations

from torch import nn

from llmdistill.errors import UserError
from llmdistill.models.few_tokens import few_tokens
from llmdistill.models.modes import computes_in_16_bits, trying_out
from llmdistill.models.weights import base_model
from llmdistill.ranks import on_every_rank
from llmdistill.rollouts.engine import RolloutEngine
from llmdistill.texts import Prompt, Sampling
from llmdistill.texts.views import plain

PROMPT_TOKENS, NEW_TOKENS = (12, 5), 6
# nats a token: engines in float32 differ by 1e-5 (measured on vLLM), a 16-bit copy by 0.05 on average, one with a stale
# output head by 0.6 and more.
ALLOWED, ALLOWED_16 = 0.02, 0.3


def check_engine(engine: RolloutEngine, model: nn.Module, *, float32: bool = False) -> None:
    """Compares an engine's log-probs of what it samples with those of the student it was just given.

    Every process of a launch calls it: sharded weights are gathered by all together. No random state is consumed.

    Args:
        model: the student as it is run in training.
        float32: whether the engine computes in it.

    Raises:
        UserError: the engine holds other weights.
    """
    prompts = [Prompt(few_tokens(model, n).input_ids[0].tolist(), "") for n in PROMPT_TOKENS]
    rollout = on_every_rank(lambda: engine.generate(prompts, Sampling(NEW_TOKENS, seed=0)))
    if rollout.behavior_logprobs is None:
        return
    inner = base_model(model)
    rollout = rollout.to(next(inner.parameters()).device)
    view = plain(rollout)
    with trying_out(inner):
        logits_BTV = model(**view.inputs(), use_cache=False).logits
    own_N = view.rows(logits_BTV).float().log_softmax(-1).gather(1, view.targets[:, None]).squeeze(1)
    assert rollout.behavior_logprobs is not None
    drawn_N = rollout.behavior_logprobs[:, 1:][rollout.completion_mask[:, 1:]]
    gap = float((own_N - drawn_N).abs().mean())
    same = float32 and not computes_in_16_bits(inner)
    if not gap <= (ALLOWED if same else ALLOWED_16):
        raise UserError(
            f"after the first push the rollout engine's log-probs are {gap:.2g} nats a token off the student's own: it "
            "holds other weights, or computes another model from them. Fix: rollouts.engine hf, and report the "
            f"architecture, {type(inner).__name__}."
        )
