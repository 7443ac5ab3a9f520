"""Makes the four reference files that nobody's code was run for, by brute force and without this project's code.

    python -m tests.diffusion.golden_makers      # writes tests/golden/diffusion/*.json

Plain Python in float64: posteriors are enumerated, integrals are those of polynomials in fractions, derivatives are
complex steps, sums over steps are written out. What the library computes in closed form or by a recursion is here the
definition it comes from. A test makes them anew and compares.
"""

from __future__ import annotations

import cmath
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "golden/diffusion"
EPS = 1e-3


def softmax(row: Sequence[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


def numbers(rng: random.Random, *shape: int) -> Any:
    """Standard normal numbers with four digits, nested lists."""
    if not shape:
        return round(rng.gauss(0, 1), 4)
    return [numbers(rng, *shape[1:]) for _ in range(shape[0])]


# ---------------------------------------------------------------------------------------------------------- mdlm_loss

SIGMAS: dict[str, Callable[[complex], complex]] = {
    "log_linear": lambda t: -cmath.log(1 - (1 - EPS) * t),
    "cosine_mdlm": lambda t: -cmath.log(EPS + (1 - EPS) * cmath.cos(t * math.pi / 2)),
    "cosine_squared": lambda t: -cmath.log(EPS + (1 - EPS) * cmath.cos(t * math.pi / 2) ** 2),
}


def subs(logits: Sequence[float], token: int, mask: int) -> list[float]:
    """Probabilities of SUBS: none on the mask token; a token that is there stays."""
    if token != mask:
        return [float(v == token) for v in range(len(logits))]
    rest = softmax([x for v, x in enumerate(logits) if v != mask])
    return [*rest[:mask], 0.0, *rest[mask:]]


def transition(keep: float, size: int, mask: int) -> list[list[float]]:
    """The absorbing chain's matrix Q[from][to]."""
    rows = [[keep * (i == j) + (1 - keep) * (j == mask) for j in range(size)] for i in range(size)]
    rows[mask] = [float(j == mask) for j in range(size)]
    return rows


def posterior(x_t: int, x_0: int, alpha_s: float, alpha_t: float, size: int, mask: int) -> list[float]:
    """q(x_s | x_t, x_0) = q(x_s | x_0) q(x_t | x_s) / q(x_t | x_0), state by state."""
    from_clean = transition(alpha_s, size, mask)[x_0]
    onwards = transition(alpha_t / alpha_s, size, mask)
    weights = [from_clean[j] * onwards[j][x_t] for j in range(size)]
    return [w / sum(weights) for w in weights]


def reverse_step_kl(x_t: int, x_0: int, alphas: tuple[float, float], predicted: list[float], mask: int) -> float:
    """KL(q(x_s | x_t, x_0) || sum_v q(x_s | x_t, v) p(v)), the term of D3PM's bound."""
    size = len(predicted)
    true = posterior(x_t, x_0, *alphas, size, mask)
    model = [0.0] * size
    for v, p in enumerate(predicted):
        if p:
            model = [m + p * q for m, q in zip(model, posterior(x_t, v, *alphas, size, mask), strict=True)]
    return sum(a * math.log(a / b) for a, b in zip(true, model, strict=True) if a)


def mdlm_loss() -> dict[str, Any]:
    rng = random.Random(1)
    size, mask, steps = 5, 4, 10
    logits, x_0 = numbers(rng, 2, 3, size), [[0, 3, 1], [2, 2, 0]]
    masked, t = [[True, False, True], [True, True, False]], [0.37, 0.82]
    ce, probabilities, continuous, discrete = [], [], [], []
    snapped = [math.floor(time * steps) / steps + 1 / steps for time in t]
    for b, row in enumerate(x_0):
        noisy = [mask if m else x for x, m in zip(row, masked[b], strict=True)]
        found = [subs(logits[b][i], noisy[i], mask) for i in range(3)]
        probabilities.append(found)
        ce.append([-math.log(found[i][row[i]]) for i in range(3)])
        sigma, h = SIGMAS["log_linear"], 1e-200
        rate = sigma(t[b] + 1j * h).imag / h
        continuous.append([rate / math.expm1(sigma(t[b]).real) * x * m for x, m in zip(ce[-1], masked[b], strict=True)])
        alphas = tuple(1 - time for time in (snapped[b] - 1 / steps, snapped[b]))
        discrete.append(
            [steps * reverse_step_kl(noisy[i], row[i], alphas, found[i], mask) for i in range(3)]  # type: ignore[arg-type]
        )
    schedules = {}
    for name, sigma in SIGMAS.items():
        rows = []
        for time in (0.05, 0.3, 0.5, 0.77, 0.99):
            value, rate = sigma(time).real, sigma(time + 1e-200j).imag / 1e-200
            rows.append({"t": time, "sigma": value, "rate": rate, "weight": rate / math.expm1(value)})
        schedules[name] = rows
    length, least = 3, Fraction(1, 1000)
    by_pattern = [
        [abs(round(rng.gauss(1, 0.5), 4)) if hidden else 0.0 for hidden in pattern]
        for pattern in itertools.product([False, True], repeat=length)
    ]
    return {
        "source": "derived (tests/diffusion/golden_makers.py); MDLM, arXiv 2406.07524, equations 8 to 11, section 3.5",
        "formula": "SUBS; w(t) = sigma' / expm1(sigma); T KL(q(x_s|x_t,x_0) || p(x_s|x_t)); int f(m)/m dm over masks",
        "inputs": {
            "mask_id": mask,
            "logits": logits,
            "x0": x_0,
            "masked": masked,
            "t": t,
            "steps": steps,
            "ce_by_pattern": by_pattern,
            "least_masked_share": float(least),
        },
        "expected": {
            "subs_probabilities": probabilities,
            "continuous": continuous,
            "continuous_loss": sum(map(sum, continuous)) / 6,
            "snapped_t": snapped,
            "discrete": discrete,
            "schedules": schedules,
            "change_of_variables": float(integral_over_masked_share(by_pattern, length, least)),
        },
    }


def integral_over_masked_share(ce_by_pattern: list[list[float]], length: int, least: Fraction) -> Fraction:
    """int_least^1 (1/m) E_patterns[sum CE] dm, with the binomial written out: a polynomial, in fractions."""
    total = Fraction(0)
    for pattern, losses in zip(itertools.product([False, True], repeat=length), ce_by_pattern, strict=True):
        k = sum(pattern)
        for j in range(length - k + 1) if k else ():  # m^(k-1) (1-m)^(L-k) = sum_j C(L-k, j) (-1)^j m^(k-1+j)
            power = k + j
            part = Fraction(math.comb(length - k, j) * (-1) ** j, power) * (1 - least**power)
            total += part * Fraction(str(round(sum(losses), 4)))
    return total


# ----------------------------------------------------------------------------------------------------- log_likelihood


def log_likelihood() -> dict[str, Any]:
    """A chain's joint, perturbed denoisers by table, LLaDA's estimate on recorded masks, and the mean over all orders
    written out."""
    rng = random.Random(2)
    vocab, length, draws = 3, 4, 8
    x = [0, 2, 1, 1]
    logits = {"".join(map(str, s)): numbers(rng, length, vocab) for s in states(x, vocab)}
    answers = {}
    for state, rows in logits.items():
        answers[state] = [math.log(softmax(rows[i])[x[i]]) for i in range(length)]
    orders = list(itertools.permutations(range(length)))
    by_orders = 0.0
    for order in orders:
        state = [vocab] * length
        for position in order:
            by_orders -= answers["".join(map(str, state))][position] / len(orders)
            state[position] = x[position]
    cases = []
    for k in range(1, length + 1):  # LLaDA's get_log_likelihood, section 2.4 of its appendix and eval_llada
        places = [round(k + j * length / draws) for j in range(draws)]
        counts = [(place - 1) % length + 1 for place in places]
        u = [[rng.random() for _ in range(length)] for _ in range(draws)]
        masks = [
            sorted(range(length), key=lambda i, row=row: row[i])[:count] for row, count in zip(u, counts, strict=True)
        ]
        estimate = 0.0
        for hidden, count in zip(masks, counts, strict=True):
            state = "".join(str(vocab if i in hidden else x[i]) for i in range(length))
            estimate += sum(answers[state][i] for i in hidden) / (count / length) / draws
        cases.append({"k": k, "counts": counts, "u": u, "masked": [sorted(m) for m in masks], "estimate": estimate})
    return {
        "source": "derived (tests/diffusion/golden_makers.py); LLaDA, arXiv 2502.09992, appendix A and B.5",
        "formula": "mean_j (L / l_j) sum_{masked} log p(x_i | noisy); = E over orders of the chain rule, exactly",
        "inputs": {"vocab": vocab, "x": x, "mask_id": vocab, "draws": draws, "logits": logits},
        "expected": {"bound": by_orders, "estimates": cases},
    }


def states(x: list[int], mask: int) -> list[tuple[int, ...]]:
    """Every state that masks a part of x."""
    return list(itertools.product(*[(token, mask) for token in x]))


# ------------------------------------------------------------------------------------------------------ tracerl_value


def tracerl_value() -> dict[str, Any]:
    rng = random.Random(3)
    step_map = [-1, 2, 0, 3, 0, 2, 1, -1]
    rewards, values = numbers(rng, 8), numbers(rng, 8)
    where = {step: [i for i, s in enumerate(step_map) if s == step] for step in sorted(set(step_map) - {-1})}
    times = list(where)
    r = [sum(rewards[i] for i in where[s]) / len(where[s]) for s in times]
    v = [sum(values[i] for i in where[s]) / len(where[s]) for s in times]
    cases = []
    for gamma, lam in ((1.0, 1.0), (1.0, 0.0), (0.9, 0.8)):
        delta = [r[k] - v[k] + (gamma * v[k + 1] if k + 1 < len(times) else 0.0) for k in range(len(times))]
        returns, advantages = [0.0] * 8, [0.0] * 8
        for k, step in enumerate(times):
            later_return = sum(gamma ** (j - k) * r[j] for j in range(k + 1, len(times)))
            later_advantage = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k + 1, len(times)))
            next_value = gamma * v[k + 1] if k + 1 < len(times) else 0.0
            for i in where[step]:
                returns[i] = rewards[i] + later_return
                advantages[i] = rewards[i] - values[i] + next_value + later_advantage
        cases.append({"gamma": gamma, "lam": lam, "returns": returns, "advantages": advantages})
    now, old, target, eps = numbers(rng, 8), numbers(rng, 8), numbers(rng, 8), 0.2
    clipped = []
    for a, b, c in zip(now, old, target, strict=True):
        near = min(max(a, b - eps), b + eps)
        clipped.append(max((a - c) ** 2, (near - c) ** 2) / 2)
    return {
        "source": "derived (tests/diffusion/golden_makers.py); TraceRL, arXiv 2509.06949, section 3.3",
        "formula": "R_j = r_j + sum_k gamma^k r*_{t+k}; A_j = r_j - V_j + gamma V*_{t+1} + sum_k (gamma lam)^k delta*",
        "inputs": {
            "step_map": step_map,
            "rewards": rewards,
            "values": values,
            "new_values": now,
            "old_values": old,
            "targets": target,
            "eps": eps,
        },
        "expected": {"gae": cases, "clipped_value_loss": clipped},
    }


# ------------------------------------------------------------------------------------------- diffu_and_coupled_grpo


def diffu_and_coupled_grpo() -> dict[str, Any]:
    rng = random.Random(4)
    samples, length, vocab, mask_id = 4, 3, 4, 4
    new, old, reference = (
        [[round(-abs(rng.gauss(1, 0.7)), 4) for _ in range(length)] for _ in range(samples)] for _ in range(3)
    )
    mask = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    rewards, eps = [1.0, 0.0, 0.25, 1.0], 0.5
    advantages = [reward - sum(rewards) / samples for reward in rewards]
    losses = []
    for beta in (0.0, 0.04):
        total = count = 0.0
        for b, i in itertools.product(range(samples), range(length)):
            if not mask[b][i]:
                continue
            ratio = math.exp(new[b][i] - old[b][i])
            gain = min(ratio * advantages[b], min(max(ratio, 1 - eps), 1 + eps) * advantages[b])
            toward = reference[b][i] - new[b][i]
            total += -gain + beta * (math.exp(toward) - toward - 1)
            count += 1
        losses.append({"beta": beta, "loss": total / count})
    prompt_u, share = [[rng.random() for _ in range(2)] for _ in range(samples)], 0.15
    hidden = [[int(u < share) for u in row] for row in prompt_u]
    t, u = 0.35, [rng.random() for _ in range(length)]
    ids = [2, 0, 3]
    whole, part, rest = numbers(rng, 3, length, vocab)
    in_part = [x < t for x in u]

    def logp(rows: list[list[float]], i: int) -> float:
        return math.log(softmax(rows[i])[ids[i]])

    coupled = [
        (logp(whole, i) + (logp(part, i) / t if in_part[i] else logp(rest, i) / (1 - t))) / 2 for i in range(length)
    ]
    return {
        "source": "derived (tests/diffusion/golden_makers.py); d1, arXiv 2504.12216, equations 3 and 4; coupled-GRPO, "
        "arXiv 2506.20639, section 4.2",
        "formula": "-min(rA, clip(r)A) + beta (e^d - d - 1), d = ref - new, over all tokens; A = r - mean; "
        "(log p_full + [M] log p_M / t + [not M] log p_rest / (1 - t)) / 2",
        "inputs": {
            "new": new,
            "old": old,
            "reference": reference,
            "mask": mask,
            "rewards": rewards,
            "eps": eps,
            "mask_id": mask_id,
            "prompt_u": prompt_u,
            "prompt_share": share,
            "t": t,
            "u": u,
            "ids": ids,
            "logits_full": whole,
            "logits_part": part,
            "logits_rest": rest,
        },
        "expected": {"advantages": advantages, "losses": losses, "prompt_masked": hidden, "coupled": coupled},
    }


MAKERS = {f.__name__: f for f in (mdlm_loss, log_likelihood, tracerl_value, diffu_and_coupled_grpo)}


def main() -> None:
    for name, make in MAKERS.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(make(), indent=1) + "\n")


if __name__ == "__main__":
    main()
