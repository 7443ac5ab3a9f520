"""Policy gradients of f-divergences and of PowerOPD: the expected gradient, every token enumerated."""

import math

import pytest
import torch
from objective_cases import INF, golden, logits, value_and_grad

from llmdistill.objectives import divergences, policy
from llmdistill.objectives.f_cores import F_DIVERGENCES
from llmdistill.objectives.f_policy import f_advantage, sampled_f
from llmdistill.objectives.power import power_reward, power_sampled
from llmdistill.objectives.sampler import token_logprobs

V = 7
NAMES = [*F_DIVERGENCES, "alpha_0", "alpha_0.3", "alpha_1", "alpha_1.5", "alpha_2.0", "alpha_-0.5", "alpha_-2"]
every_name = pytest.mark.parametrize("name", NAMES)

# f of every name, written out: u [...] -> [...]. alpha_<a> beside them.
GENERATORS = {
    "kl_forward": lambda u: u * u.log(),
    "kl_reverse": lambda u: -u.log(),
    "jensen_shannon": lambda u: (u * u.log() - (1 + u) * ((1 + u) / 2).log()) / 2,
    "jeffreys_sum": lambda u: (u - 1) * u.log(),
    "total_variation": lambda u: (u - 1).abs() / 2,
    "pearson_chi2": lambda u: (u - 1) ** 2,
    "neyman_chi2": lambda u: (1 - u) ** 2 / u,
    "squared_hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "triangular": lambda u: (u - 1) ** 2 / (1 + u),
    "alpha_0": lambda u: -u.log(),
    "alpha_1": lambda u: u * u.log(),
}


def generator(name):
    if name in GENERATORS:
        return GENERATORS[name]
    a = float(name.removeprefix("alpha_"))
    return lambda u: (u**a - 1 - a * (u - 1)) / (a * (a - 1))


def models(n=3):
    return tuple(logits(seed, n, V, scale=1.5, dtype=torch.float64) for seed in (0, 1))


def expected_gradient(student, drawn_from, loss):
    """sum_y p(y) grad loss(z, y)."""
    total = torch.zeros_like(student)
    for y in range(V):
        ids = torch.full((len(student),), y)
        total += drawn_from[:, y, None] * value_and_grad(lambda z, y=ids: loss(z, y), student)[1]
    return total


class TestFDivergences:
    @every_name
    def test_the_expected_gradient_is_that_of_the_divergence(self, name):
        student, teacher = models()
        _, exact = value_and_grad(lambda z: divergences.f_divergence(z, teacher, name=name), student)
        found = expected_gradient(
            student, student.softmax(-1), lambda z, y: sampled_f(z, y, token_logprobs(teacher, y), name=name)
        )
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)

    @every_name
    @pytest.mark.parametrize("setting", [(1.0, 3, 1.0), (1.0, 0, 0.8), (0.6, 0, 1.0), (0.6, 4, 0.9)], ids=str)
    def test_with_a_truncated_or_tempered_sampler(self, name, setting):
        """The gradient of sum_K S_K f(c T_tau / S_K), c held fixed: autograd of the formula."""
        temperature, top_k, top_p = setting
        student, teacher = models()
        s = (student / temperature).softmax(-1)
        kept = torch.ones_like(s, dtype=torch.bool)
        if top_k:
            kept = s >= s.topk(top_k).values[:, -1:]
        ranked, order = (s * kept / (s * kept).sum(-1, keepdim=True)).sort(-1, descending=True)
        kept &= torch.zeros_like(kept).scatter(-1, order, ranked.cumsum(-1) - ranked < top_p)
        restricted = (student / temperature).masked_fill(~kept, -INF).softmax(-1)
        ratio = ((teacher.log_softmax(-1) - student.log_softmax(-1)) / temperature).exp()  # u
        target = ratio * restricted  # c T_tau on K

        def formula(z):
            p = (z / temperature).masked_fill(~kept, -INF).softmax(-1)
            safe = torch.where(kept, p, 1.0)
            f = generator(name)(torch.where(kept, target / safe, 1.0))
            return (torch.where(kept, safe * f, 0.0)).sum(-1)

        _, exact = value_and_grad(formula, student)

        def loss(z, y):
            lp = token_logprobs(teacher, y)
            return sampled_f(z, y, lp, name=name, temperature=temperature, top_k=top_k, top_p=top_p)

        found = expected_gradient(student, restricted, loss)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)

    @every_name
    def test_the_advantage_is_the_formula_and_vanishes_where_both_agree(self, name):
        """f(1) = 0 for all of them, so A = u f'(u) - f(u) - f'(1)."""
        log_u = torch.linspace(-5, 5, 21, dtype=torch.float64)
        u = log_u.exp().requires_grad_()
        f = generator(name)(u)
        (slope,) = torch.autograd.grad(f.sum(), u)
        at_one = slope[10] if name != "total_variation" else torch.zeros(())  # a kink there
        found = f_advantage(log_u, name)
        expected = (u * slope - f).detach() - at_one
        keep = torch.arange(21) != 10
        torch.testing.assert_close(found[keep], expected[keep].double(), rtol=1e-9, atol=1e-12)
        assert abs(found[10].item()) < 1e-12

    def test_the_published_weights(self):
        """estimators_opd_plus.json: w = u f' - f, which exceeds ours by f'(1), and the true gradients."""
        data = golden("estimators_opd_plus")
        student, teacher = data["inputs"]["student_logits"], data["inputs"]["teacher_logits"]
        names = {
            "reverse_kl": ("kl_reverse", -1.0),
            "forward_kl": ("kl_forward", 1.0),
            "js": ("jensen_shannon", 0.0),
            "hellinger_sq": ("squared_hellinger", 0.0),
            "pearson": ("pearson_chi2", 0.0),
        }
        for theirs, (name, derivative_at_one) in names.items():
            expected = data["f_divergences"][theirs]
            weights = torch.tensor(expected["weights"], dtype=torch.float64)
            log_u = teacher.log_softmax(-1) - student.log_softmax(-1)
            torch.testing.assert_close(f_advantage(log_u, name) + derivative_at_one, weights, rtol=1e-6, atol=1e-8)
            found = expected_gradient(
                student,
                student.softmax(-1),
                lambda z, y, n=name: sampled_f(z, y, token_logprobs(teacher, y), name=n),
            )
            true = torch.tensor(expected["true_gradient"], dtype=torch.float64)
            torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-8)

    def test_the_reverse_kl_is_the_sampled_token_estimator(self):
        student, teacher = models()
        ids = torch.tensor([1, 4, 6])
        lp = token_logprobs(teacher, ids)
        for setting in ({}, {"temperature": 0.6, "top_k": 5, "top_p": 0.9}):
            found = value_and_grad(lambda z, s=setting: sampled_f(z, ids, lp, name="kl_reverse", **s), student)
            exact = value_and_grad(lambda z, s=setting: policy.sampled_token(z, ids, lp, **s), student)
            torch.testing.assert_close(found, exact)

    @every_name
    def test_it_stays_finite(self, name):
        """A teacher that excludes the token or is sure of it, against a student that thinks otherwise, in float32."""
        student = torch.tensor([[0.0, 200.0, 0.0], [0.0, 0.0, 1e4], [0.0, 1.0, -INF]])
        ids, teacher_lp = torch.tensor([0, 0, 1]), torch.tensor([-1e-6, -0.1, -INF])
        value, grad = value_and_grad(lambda z: sampled_f(z, ids, teacher_lp, name=name), student)
        assert value.isfinite().all() and grad.isfinite().all()
        assert sampled_f(student * torch.nan, ids, teacher_lp, name=name).isnan().all()

    def test_a_clip_bounds_the_advantage(self):
        student, teacher = models()
        ids = torch.tensor([1, 4, 6])
        lp, own = token_logprobs(teacher, ids), token_logprobs(student, ids)
        found = sampled_f(student, ids, lp, name="pearson_chi2", log_ratio_clip=0.5)
        u = (lp - own).clamp(-0.5, 0.5).exp()
        torch.testing.assert_close(found, -(u**2 - 1) * own)
        with pytest.raises(ValueError, match="log_ratio_clip is 0"):
            sampled_f(student, ids, lp, name="kl_forward", log_ratio_clip=0)
        with pytest.raises(ValueError, match="did you mean 'kl_forward'"):
            sampled_f(student, ids, lp, name="kl_forwrd")


# The file's other rewards and normalisations are what PowerOPD is compared with.
POWER_CASES = [c for c in golden("poweropd")["cases"] if (c["reward"], c["normalisation"]) == ("power_diff", "none")]


class TestPower:
    @pytest.mark.parametrize("case", POWER_CASES, ids=lambda c: str(c["alpha"]))
    def test_the_official_loss(self, case):
        i = golden("poweropd")["inputs"]
        lp = token_logprobs(i["teacher_logits"], i["tokens"])
        rewards = power_reward(token_logprobs(i["student_logits"], i["tokens"]), lp, case["alpha"])
        expected = torch.tensor(case["rewards"], dtype=torch.float64)
        torch.testing.assert_close(rewards[i["mask"]], expected[i["mask"]], rtol=1e-5, atol=2e-9)
        value, grad = value_and_grad(
            lambda z: power_sampled(z, i["tokens"], lp, alpha=case["alpha"])[i["mask"]].mean(), i["student_logits"]
        )
        assert value.item() == pytest.approx(case["loss"], rel=1e-5, abs=2e-9)
        expected = torch.tensor(case["grad_student_logits"], dtype=torch.float64)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=2e-9)

    @pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
    def test_the_expected_gradient_is_that_of_the_density_power_divergence(self, alpha):
        student, teacher = models()

        def oracle(z):
            s, t = z.softmax(-1), teacher.softmax(-1)
            return (s ** (alpha + 1) / (alpha + 1) - s * t**alpha).sum(-1)

        found = expected_gradient(
            student, student.softmax(-1), lambda z, y: power_sampled(z, y, token_logprobs(teacher, y), alpha=alpha)
        )
        torch.testing.assert_close(found, value_and_grad(oracle, student)[1], rtol=0, atol=1e-12)

    def test_the_official_full_vocabulary_gradient(self):
        data = golden("poweropd")
        i = data["inputs"]
        student, teacher = (i[k][0] for k in ("student_logits", "teacher_logits"))
        for case in data["full_vocabulary"]:
            found = expected_gradient(
                student,
                student.softmax(-1),
                lambda z, y, a=case["alpha"]: power_sampled(z, y, token_logprobs(teacher, y), alpha=a),
            )
            expected = torch.tensor(case["grad_sum_over_rows"], dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-9)

    def test_small_powers_are_the_reverse_kl_and_equal_models_have_no_reward(self):
        student, teacher = models()
        ids = torch.tensor([1, 4, 6])
        lp = token_logprobs(teacher, ids)
        small = power_sampled(student, ids, lp, alpha=1e-6) / 1e-6
        torch.testing.assert_close(small, policy.sampled_token(student, ids, lp), rtol=1e-4, atol=1e-6)
        assert (power_sampled(student, ids, token_logprobs(student, ids), alpha=5.0) == 0).all()
        for alpha in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="alpha is"):
                power_sampled(student, ids, lp, alpha=alpha)
