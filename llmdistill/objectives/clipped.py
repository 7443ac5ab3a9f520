"""PPO's clipped loss on sampled tokens: several updates on one text, none of them far from the policy that drew it."""

from collections.abc import Callable

import torch
from torch import Tensor

from llmdistill.objectives.clipping import clipped_policy_loss
from llmdistill.objectives.policy import gopd_advantage
from llmdistill.objectives.sampler import check_truncation, sampler_logprobs, token_logprobs

Loss = Callable[..., Tensor]


def clipped_samples(
    advantage: Loss,
    *,
    clip: float,
    dual_clip: float = 3.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Loss:
    """`clipped_policy_loss` of the ratio S_{tau,K}(y) / behavior(y); two arguments follow the evidence of A.

    token_ids [n]; behavior_lp [n], log-probs under the policy that drew them. `advantage(student_logits, *evidence)`
    -> [n] is of the student of now and carries no gradient: frozen at the rollout it would be of another divergence
    after the first update (AsyncOPD, arXiv 2606.24143). Where nothing is clipped the gradient is that of
    -S/behavior sg[A]. NaN in behavior_lp marks tokens nobody drew: their ratio is 1.
    """
    check_truncation(top_k, top_p, min_p)
    sampler = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}

    def clipped(student_logits: Tensor, *evidence: Tensor) -> Tensor:
        *judged, token_ids, behavior_lp = evidence
        drawn_lp = sampler_logprobs(student_logits, token_ids, **sampler)  # type: ignore[arg-type]
        old_lp = torch.where(behavior_lp.isnan(), drawn_lp.detach(), behavior_lp)
        return clipped_policy_loss(
            drawn_lp, old_lp, advantage(student_logits.detach(), *judged), clip=clip, dual_clip=dual_clip
        )

    return clipped


def kl_advantage(
    student_logits: Tensor,
    token_ids: Tensor,
    teacher_lp: Tensor,
    _ids: Tensor | None = None,
    reference_lp: Tensor | None = None,
    *,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """`gopd_advantage` / tau of sampled tokens -> [n], as `policy.sampled_token` has it; the reference names the tokens
    again."""
    student_lp = token_logprobs(student_logits, token_ids)
    return gopd_advantage(student_lp, teacher_lp, reference_lp, scale) / temperature


def given_advantage(student_logits: Tensor, token_ids: Tensor, advantage: Tensor) -> Tensor:
    """The advantage of a task reward -> [n], which no update changes."""
    return advantage
