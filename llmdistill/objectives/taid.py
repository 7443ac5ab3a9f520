"""TAID: learn from a distribution between the student and the teacher that moves towards the teacher.

p_t = softmax((1 - t) sg[z_S] + t z_T), loss KL(p_t || S), t from t_start to 1 (arXiv 2501.16937, section 3). Its
gradient is S - p_t: at t = 1 that of the forward KL, at small t a step of t times that length, so a student much
smaller than its teacher is never asked for more than it can nearly do.

The schedule moves t faster while the loss falls: m = beta m + (1 - beta) (L' - L) / L', t += alpha sigmoid(m) (1 - t),
never below the line from t_start to t_end. The paper drives it by KL(p_t || S); its released code by the cross-entropy
-sum p_t log S, whose entropy part changes with t by itself. Which of the two to feed is the caller's choice.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from llmdistill.objectives import cores
from llmdistill.objectives.divergences import dense
from llmdistill.objectives.sparse import bucketed


def taid(student_logits: Tensor, teacher_logits: Tensor, t: float, *, temperature: float = 1.0) -> Tensor:
    """KL(p_t || S) per token -> [...], for logits [..., V] of both. No gradient through p_t.

    Raises ValueError for t outside [0, 1] and as every divergence does.
    """
    return dense(partial(towards_teacher, t=t), student_logits, teacher_logits, temperature)


def sparse_taid(
    student_logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, t: float, *, temperature: float = 1.0
) -> Tensor:
    """The same on K listed tokens and a bucket for all others, interpolating their log-probs; `taid` at K = V."""
    core = partial(towards_teacher, t=t)
    return bucketed(core, student_logits, topk_ids, topk_logprobs, temperature, "bucket")


def towards_teacher(log_s: Tensor, log_t: Tensor, s: Tensor, *, t: float) -> tuple[Tensor, Tensor]:
    """A core (see `cores`) on log-probs of tokens or buckets."""
    return cores.forward_kl(log_s, towards(log_s, log_t, t), s)


def towards(log_s: Tensor, log_t: Tensor, t: float) -> Tensor:
    """log p_t: log-probs interpolate like logits, up to the constant that normalising takes away. Overwrites log_t."""
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"t is {t}; it is the share of the teacher in the target and must lie in [0, 1]")
    if t == 0.0:  # 0 * -inf is NaN
        return log_s.clone()
    target = log_t if t == 1.0 else log_t.mul_(t).add_(log_s, alpha=1.0 - t)
    return target.sub_(target.logsumexp(-1, keepdim=True))


@dataclass
class TAIDSchedule:
    """The share t of the teacher over training. Defaults are the paper's (t_start .4 for Phi-3, .2 for Llama-2).

    Raises ValueError for values outside 0 <= t_start <= t_end <= 1, alpha >= 0, 0 <= beta < 1, num_steps >= 1.
    """

    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    num_steps: int = 1000

    def __post_init__(self) -> None:
        if not 0.0 <= self.t_start <= self.t_end <= 1.0:
            raise ValueError(f"t goes from {self.t_start} to {self.t_end}; needed: 0 <= t_start <= t_end <= 1")
        if not (self.alpha >= 0.0 and 0.0 <= self.beta < 1.0 and self.num_steps >= 1):
            raise ValueError(f"alpha >= 0, 0 <= beta < 1 and num_steps >= 1 are needed, not {self}")
        self.t, self.momentum, self.previous_loss = self.t_start, 0.0, math.nan

    def update(self, loss: float, step: int) -> float:
        """t after the optimizer step number `step` with this loss; the first loss is only remembered."""
        previous, self.previous_loss = self.previous_loss, float(loss)
        if not math.isnan(previous):
            change = (previous - self.previous_loss) / (previous + 1e-15)
            self.momentum = self.beta * self.momentum + (1.0 - self.beta) * change
            # sigmoid by way of tanh: after a loss of almost 0 the change is beyond what exp can take.
            moved = self.t + self.alpha * (1.0 - self.t) * 0.5 * (1.0 + math.tanh(0.5 * self.momentum))
            line = self.t_start + (self.t_end - self.t_start) * step / self.num_steps
            self.t = min(self.t_end, max(line, moved))
        return self.t

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"t": self.t, "momentum": self.momentum, "previous_loss": self.previous_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self.momentum, self.previous_loss = state["t"], state["momentum"], state["previous_loss"]
