"""Dense divergences: reference values, and the properties that make them divergences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import CASES, INF, Case, golden, logits, value_and_grad

from llmdistill.objectives import divergences

every_divergence = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
anything = settings(max_examples=15, deadline=None, derandomize=True)
seeds, widths, scales = st.integers(0, 10**6), st.integers(2, 40), st.floats(0.01, 30.0)


class TestReferences:
    @pytest.mark.parametrize("case", golden("divergences_trl_gkd")["cases"], ids=lambda case: case["name"])
    def test_jsd_equals_trl(self, case):
        """Values per token and the gradient of the token mean equal TRL's generalised JSD to 1e-5."""
        inputs = golden("divergences_trl_gkd")["inputs"]
        student, mask = inputs["student_logits"], inputs["mask"]

        def loss(z):
            return divergences.jsd(z, inputs["teacher_logits"], beta=case["beta"], temperature=case["temperature"])

        expected = torch.tensor(case["per_token"], dtype=torch.float64)
        torch.testing.assert_close(loss(student), expected, rtol=1e-5, atol=1e-8)
        mean, grad = value_and_grad(lambda z: loss(z)[mask].mean(), student)
        assert mean.item() == pytest.approx(case["expected_token_mean"], rel=1e-5)
        expected_grad = torch.tensor(case["grad_student_logits"], dtype=torch.float64)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-9)
        in_float32 = divergences.jsd(
            student.float(), inputs["teacher_logits"], beta=case["beta"], temperature=case["temperature"]
        )
        assert in_float32[mask].mean().item() == pytest.approx(case["expected_token_mean_float32"], rel=1e-5)

    @pytest.mark.parametrize("case", golden("f_divergences")["cases"], ids=lambda case: case["name"])
    def test_f_divergence_equals_tensorflow_probability(self, case):
        """All 13 generators: values per position and the gradient of the token mean to 1e-5."""
        inputs = golden("f_divergences")["inputs"]
        mask = inputs["mask"]

        def loss(z):
            return divergences.f_divergence(z, inputs["teacher_logits"], name=case["name"])

        expected = torch.tensor(case["per_position"], dtype=torch.float64)
        torch.testing.assert_close(loss(inputs["student_logits"])[mask], expected[mask], rtol=1e-5, atol=1e-8)
        mean, grad = value_and_grad(lambda z: loss(z)[mask].mean(), inputs["student_logits"])
        assert mean.item() == pytest.approx(case["expected"], rel=1e-5)
        expected_grad = torch.tensor(case["grad_student_logits"], dtype=torch.float64)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-9)

    def test_skew_kl_is_kl_to_the_mixture(self):
        """KL(T || aT + (1-a)S) and KL(S || (1-a)T + aS), written out, with their autograd gradients."""
        student, teacher, a = (
            logits(0, 5, 17, dtype=torch.float64),
            logits(1, 5, 17, dtype=torch.float64),
            0.3,
        )

        def forward(z):
            s, t = z.softmax(-1), teacher.softmax(-1)
            return (t * (t / (a * t + (1 - a) * s)).log()).sum(-1)

        def reverse(z):
            s, t = z.softmax(-1), teacher.softmax(-1)
            return (s * (s / ((1 - a) * t + a * s)).log()).sum(-1)

        for name, plain in (("skew_forward_kl", forward), ("skew_reverse_kl", reverse)):
            ours = value_and_grad(lambda z, n=name: getattr(divergences, n)(z, teacher, alpha=a), student)
            torch.testing.assert_close(ours, value_and_grad(plain, student))

    @pytest.mark.parametrize("head_mass", [0.2, 0.5, 0.95])
    def test_adaptive_kl_is_the_weighted_sum_of_both(self, head_mass):
        """METHODS 1.6 token by token; the weights are constants of the gradient."""
        student, teacher = logits(0, 6, 9, dtype=torch.float64), logits(1, 6, 9, dtype=torch.float64)
        s, t = student.softmax(-1), teacher.softmax(-1)
        share = torch.zeros(6, dtype=torch.float64)
        for row in range(6):
            mass, head = 0.0, []
            for token in t[row].argsort(descending=True).tolist():
                mass += t[row, token].item()
                if head and mass > head_mass:
                    break
                head.append(token)
                if mass > head_mass:
                    break
            gap = (t - s)[row].abs()
            share[row] = gap[head].sum() / gap.sum()

        def plain(z):
            return share * divergences.forward_kl(z, teacher) + (1 - share) * divergences.reverse_kl(z, teacher)

        ours = value_and_grad(lambda z: divergences.adaptive_kl(z, teacher, head_mass=head_mass), student)
        torch.testing.assert_close(ours, value_and_grad(plain, student))


class TestProperties:
    @every_divergence
    @anything
    @given(seed=seeds, width=widths, scale=scales)
    def test_never_negative(self, case: Case, seed, width, scale):
        value = case.dense(logits(seed, 4, width, scale=scale), logits(seed + 1, 4, width, scale=scale))
        assert (value >= -1e-6).all()

    @every_divergence
    @anything
    @given(seed=seeds, width=widths, scale=scales)
    def test_value_and_gradient_vanish_at_equality(self, case: Case, seed, width, scale):
        student = logits(seed, 4, width, scale=scale)
        # The same distribution, not the same numbers: a constant is added to the logits.
        value, grad = value_and_grad(lambda z: case.dense(z, student + 0.5), student)
        torch.testing.assert_close(value, torch.zeros(4), rtol=0, atol=1e-5)
        # |u - 1| has a kink at equality: its gradient is bounded by S, not small.
        if "total_variation" not in case.name:
            torch.testing.assert_close(grad, torch.zeros(4, width), rtol=0, atol=1e-5)
        # To the last bit the same: only the rounding of log M is left, and |u - 1| stands on its kink.
        value, grad = value_and_grad(lambda z: case.dense(z, student), student)
        assert value.abs().max() <= 1e-6 and grad.abs().max() <= 1e-7

    @every_divergence
    @anything
    @given(seed=seeds, width=widths)
    def test_renaming_tokens_changes_nothing(self, case: Case, seed, width):
        student, teacher = logits(seed, 3, width), logits(seed + 1, 3, width)
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(
            case.dense(student[:, order], teacher[:, order]),
            case.dense(student, teacher),
            rtol=1e-4,
            atol=1e-6,
        )

    @every_divergence
    @anything
    @given(seed=seeds, width=widths, temperature=st.floats(0.3, 5.0))
    def test_temperature_divides_both_logits(self, case: Case, seed, width, temperature):
        """Value and gradient; no temperature^2."""
        student = logits(seed, 3, width, scale=1.0, dtype=torch.float64)
        teacher = logits(seed + 1, 3, width, scale=1.0, dtype=torch.float64)
        torch.testing.assert_close(
            value_and_grad(lambda z: case.dense(z, teacher, temperature=temperature), student),
            value_and_grad(lambda z: case.dense(z / temperature, teacher / temperature), student),
            rtol=1e-8,
            atol=1e-12,
        )

    @pytest.mark.parametrize("case", [c for c in CASES if c.function != "adaptive_kl"], ids=lambda c: c.name)
    def test_gradient_is_the_slope_of_the_value(self, case: Case):
        """Central differences; not for adaptive KL, whose weights are constants by definition."""
        teacher = logits(1, 3, 7, scale=1.0, dtype=torch.float64)
        student = logits(0, 3, 7, scale=1.0, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: case.dense(z, teacher, temperature=0.7), student)

    @every_divergence
    def test_teacher_gets_no_gradient(self, case: Case):
        teacher = logits(1, 3, 7).requires_grad_()
        case.dense(logits(0, 3, 7).requires_grad_(), teacher).sum().backward()
        assert teacher.grad is None

    @every_divergence
    def test_keeps_leading_dimensions_and_forms_losses_in_float32(self, case: Case):
        student, teacher = logits(0, 2, 3, 7), logits(1, 2, 3, 7)
        value, grad = value_and_grad(lambda z: case.dense(z, teacher.bfloat16()), student.bfloat16())
        assert value.shape == (2, 3) and value.dtype == torch.float32 and grad.dtype == torch.bfloat16
        expected = case.dense(student.bfloat16().float(), teacher.bfloat16().float())
        torch.testing.assert_close(value, expected)
        assert case.dense(student[:0], teacher[:0]).shape == (0, 3)


class TestExtremes:
    @every_divergence
    @anything
    @given(seed=seeds, width=st.integers(2, 12), magnitude=st.sampled_from([50.0, 300.0, 1e4]))
    def test_huge_logits_give_finite_values_and_gradients(self, case: Case, seed, width, magnitude):
        student = logits(seed, 3, width).sign() * magnitude
        teacher = logits(seed + 1, 3, width).sign() * magnitude
        value, grad = value_and_grad(lambda z: case.dense(z, teacher), student)
        assert value.isfinite().all() and grad.isfinite().all() and (value >= -1e-6).all()

    @every_divergence
    @pytest.mark.parametrize("masked", [[0], [1, 4], [0, 1, 2, 3, 5]])
    def test_a_token_impossible_on_both_sides_does_not_exist(self, case: Case, masked):
        """Value and gradient are those of the vocabulary without it; its own gradient is exactly 0."""
        student, teacher = logits(0, 3, 6), logits(1, 3, 6)
        kept = [column for column in range(6) if column not in masked]
        expected, expected_grad = value_and_grad(lambda z: case.dense(z, teacher[:, kept]), student[:, kept])
        student[:, masked] = teacher[:, masked] = -INF
        value, grad = value_and_grad(lambda z: case.dense(z, teacher), student)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad[:, kept], expected_grad)
        assert (grad[:, masked] == 0).all()

    @every_divergence
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_a_token_impossible_on_one_side_gives_the_limit(self, case: Case, side):
        """+inf where the mathematics says so, else the limit of ever smaller probabilities; never NaN."""
        student, teacher = logits(0, 3, 6, dtype=torch.float64), logits(1, 3, 6, dtype=torch.float64)
        z = student if side == "student" else teacher
        z[:, 2] = -INF
        value, grad = value_and_grad(lambda s: case.dense(s, teacher), student)
        infinite = case.inf_without_student if side == "student" else case.inf_without_teacher
        if infinite:
            assert (value == INF).all()
            return
        z[:, 2] = -200.0
        torch.testing.assert_close(value, case.dense(student, teacher), rtol=1e-6, atol=1e-9)
        assert grad.isfinite().all()

    @every_divergence
    def test_nan_logits_are_not_hidden(self, case: Case):
        """A diverged model must show in the loss."""
        good, bad = logits(0, 2, 6), logits(1, 2, 6)
        bad[0, 3] = math.nan
        for value in (case.dense(bad, good), case.dense(good, bad)):
            assert value[0].isnan() and value[1].isfinite()

    def test_forward_kl_beyond_float_range_of_the_ratio(self):
        """T = (1, 0), S = (e^-2e4, 1): KL(T || S) is 2e4 nats although S underflows."""
        student, teacher = torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4])
        assert divergences.forward_kl(student, teacher).item() == pytest.approx(2e4)
        assert divergences.reverse_kl(student, teacher).item() == pytest.approx(2e4)


class TestErrors:
    @every_divergence
    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
    def test_temperature(self, case: Case, temperature):
        with pytest.raises(ValueError, match=r"temperature is .*must be > 0"):
            case.dense(logits(0, 2, 5), logits(1, 2, 5), temperature=temperature)

    @every_divergence
    def test_widths_differ(self, case: Case):
        with pytest.raises(ValueError, match="5 columns.* 6: cut both to the shared width first"):
            case.dense(logits(0, 2, 5), logits(1, 2, 6))

    def test_rows_differ(self):
        with pytest.raises(ValueError, match=r"\(2, 5\), the teacher's \(1, 5\).*same rows"):
            divergences.forward_kl(logits(0, 2, 5), logits(1, 1, 5))

    @pytest.mark.parametrize("beta", [-0.1, 1.1])
    def test_beta(self, beta):
        with pytest.raises(ValueError, match=rf"beta is {beta}.*\[0, 1\]"):
            divergences.jsd(logits(0, 2, 5), logits(1, 2, 5), beta=beta)

    @pytest.mark.parametrize("alpha", [-0.1, 1.0])
    @pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
    def test_alpha(self, name, alpha):
        with pytest.raises(ValueError, match=rf"alpha is {alpha}.*\[0, 1\)"):
            getattr(divergences, name)(logits(0, 2, 5), logits(1, 2, 5), alpha=alpha)

    @pytest.mark.parametrize("head_mass", [0.0, 1.0])
    def test_head_mass(self, head_mass):
        with pytest.raises(ValueError, match=rf"head_mass is {head_mass}.*\(0, 1\)"):
            divergences.adaptive_kl(logits(0, 2, 5), logits(1, 2, 5), head_mass=head_mass)

    @pytest.mark.parametrize("name", ["pearson", "alpha_", "alpha_inf", "nonsense"])
    def test_unknown_f(self, name):
        hint = r"did you mean 'pearson_chi2'" if name == "pearson" else "known: kl_forward, kl_reverse"
        with pytest.raises(ValueError, match=f"'{name}' is unknown.*{hint}"):
            divergences.f_divergence(logits(0, 2, 5), logits(1, 2, 5), name=name)
