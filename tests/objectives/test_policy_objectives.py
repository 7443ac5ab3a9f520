"""Policy-gradient objectives: reference values, and the estimator's exact expectation."""

import math

import pytest
import torch
from objective_cases import golden, logits, value_and_grad

from llmdistill.objectives import clipping, divergences, metrics, policy


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, tensor(expected), rtol=1e-5, atol=1e-9)


class TestOPDReferences:
    """opd_estimators.json: TRL, OPSD and thunlp."""

    def setup_method(self):
        self.golden = golden("opd_estimators")
        inputs = self.golden["inputs"]
        self.student, self.teacher = inputs["student_logits"], inputs["teacher_logits"]
        self.tokens, self.mask = inputs["tokens"], inputs["mask"]

    def test_full_vocabulary_is_reverse_kl(self):
        expected = self.golden["full_vocab"]
        value, grad = value_and_grad(lambda z: divergences.reverse_kl(z, self.teacher)[self.mask].mean(), self.student)
        assert value.item() == pytest.approx(expected["expected"], rel=1e-5)
        close(grad, expected["grad_student_logits"])

    def test_sampled_token(self):
        """Value per token, gradient of the token mean, and the k1 and k3 estimates of the KL."""
        expected = self.golden["sampled_token"]
        student_lp = policy.token_logprobs(self.student, self.tokens)
        teacher_lp = policy.token_logprobs(self.teacher, self.tokens)
        per_token = policy.sampled_token(self.student, self.tokens, teacher_lp)
        close(per_token[self.mask], tensor(expected["per_token_value"])[self.mask].tolist())
        value, grad = value_and_grad(
            lambda z: policy.sampled_token(z, self.tokens, teacher_lp)[self.mask].mean(), self.student
        )
        assert value.item() == pytest.approx(expected["expected_value"], rel=1e-5)
        assert value.item() == pytest.approx(self.golden["opsd_sampled_token_loss"], rel=1e-5)
        close(grad, expected["grad_student_logits"])
        k1, k3 = metrics.kl_k1(student_lp, teacher_lp), metrics.kl_k3(student_lp, teacher_lp)
        assert k1[self.mask].mean().item() == pytest.approx(expected["k1_estimate_mean"], rel=1e-5)
        assert k3[self.mask].mean().item() == pytest.approx(expected["k3_estimate_mean"], rel=1e-5)


class TestGOPDReferences:
    """gopd.json: the authors' advantage, verl's policy loss, truncated importance weights."""

    def setup_method(self):
        self.golden = golden("gopd")
        self.inputs = self.golden["inputs"]
        self.mask = self.inputs["mask"]

    def advantage(self, scale, teacher="teacher_logp"):
        i = self.inputs
        return policy.gopd_advantage(i["student_logp"], i[teacher], i["ref_logp"], scale)

    @pytest.mark.parametrize("case", golden("gopd")["cases"], ids=lambda case: case["name"])
    def test_advantage_loss_and_gradient(self, case):
        advantage = self.advantage(case["lam"])
        close(advantage, case["advantage_per_token"])
        i, mask = self.inputs, self.mask
        weights = {
            "noIS": torch.ones_like(advantage),
            "tis5": clipping.truncated_importance_weights(i["student_logp"], i["rollout_logp"], 5.0),
        }
        torch.testing.assert_close(weights["tis5"] * mask, i["tis_weights"], rtol=1e-5, atol=1e-9)

        def per_token(z, kind):
            logp = policy.token_logprobs(z, i["tokens"])
            return clipping.clipped_policy_loss(logp, i["student_logp"], advantage) * weights[kind]

        def sequence_sums(losses):
            return (losses * mask).sum(1)

        for kind in ("noIS", "tis5"):
            value, grad = value_and_grad(lambda z, k=kind: per_token(z, k)[mask].mean(), i["student_logits"])
            assert value.item() == pytest.approx(case[f"pg_loss[token-mean][{kind}]"], rel=1e-5)
            close(grad, case[f"grad_student_logits[token-mean][{kind}]"])
            sums = sequence_sums(per_token(i["student_logits"], kind))
            assert sums.mean().item() == pytest.approx(case[f"pg_loss[seq-mean-token-sum][{kind}]"], rel=1e-5)
            means = sums / mask.sum(1)
            assert means.mean().item() == pytest.approx(case[f"pg_loss[seq-mean-token-mean][{kind}]"], rel=1e-5)

    @pytest.mark.parametrize("case", golden("gopd")["cases"], ids=lambda case: case["name"])
    def test_sampled_token_is_the_same_objective_on_policy(self, case):
        i = self.inputs

        def token_mean(z):
            losses = policy.sampled_token(z, i["tokens"], i["teacher_logp"], i["ref_logp"], scale=case["lam"])
            return losses[self.mask].mean()

        _, grad = value_and_grad(token_mean, i["student_logits"])
        close(grad, case["grad_student_logits[token-mean][noIS]"])

    def test_multi_teacher_advantage(self):
        """One expert per sequence, the same reference."""
        for case in self.golden["multi_teacher"]:
            per_domain = {
                "math": self.advantage(case["lam"]),
                "code": self.advantage(case["lam"], "teacher2_logp"),
            }
            rows = torch.stack([per_domain[tag][row] for row, tag in enumerate(case["opd_teacher"])])
            close(rows, case["advantage"])

    @pytest.mark.parametrize("case", golden("gopd")["stale_policy_cases"], ids=lambda case: str(case["lam"]))
    def test_stale_policy_is_clipped(self, case):
        i, old_logp = self.inputs, tensor(case["old_log_probs"])
        advantage = policy.gopd_advantage(old_logp, i["teacher_logp"], i["ref_logp"], case["lam"])
        close(advantage, case["advantage"])

        def token_mean(z):
            logp = policy.token_logprobs(z, i["tokens"])
            return clipping.clipped_policy_loss(logp, old_logp, advantage)[self.mask].mean()

        value, grad = value_and_grad(token_mean, i["student_logits"])
        assert value.item() == pytest.approx(case["pg_loss"], rel=1e-5)
        close(grad, case["grad_student_logits"])


class TestProperties:
    def test_sampled_token_is_unbiased_for_the_reverse_kl_gradient(self):
        """sum_y S(y) grad sampled_token(y) = grad KL(S || T), every y enumerated, to 1e-10."""
        student = logits(0, 1, 7, dtype=torch.float64)
        teacher = logits(1, 1, 7, dtype=torch.float64)
        _, exact = value_and_grad(lambda z: divergences.reverse_kl(z, teacher), student)
        expectation = torch.zeros_like(exact)
        for y in range(7):
            token = torch.tensor([y])
            teacher_lp = policy.token_logprobs(teacher, token)
            _, grad = value_and_grad(lambda z, y=token, t=teacher_lp: policy.sampled_token(z, y, t), student)
            expectation += student.softmax(-1)[0, y] * grad
        torch.testing.assert_close(expectation, exact, rtol=0, atol=1e-10)

    def test_k1_and_k3_are_unbiased_and_k3_is_never_negative(self):
        student, teacher = logits(0, 7, dtype=torch.float64), logits(1, 7, dtype=torch.float64)
        log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
        exact = divergences.reverse_kl(student, teacher)
        torch.testing.assert_close((log_s.exp() * metrics.kl_k1(log_s, log_t)).sum(), exact)
        torch.testing.assert_close((log_s.exp() * metrics.kl_k3(log_s, log_t)).sum(), exact)
        assert (metrics.kl_k3(log_s, log_t) >= 0).all()

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_token_logprobs_is_log_softmax(self, temperature):
        z, ids = logits(0, 2, 3, 9), torch.randint(9, (2, 3), generator=torch.Generator().manual_seed(0))
        expected = value_and_grad(
            lambda z: (z / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1), z
        )
        torch.testing.assert_close(value_and_grad(lambda z: policy.token_logprobs(z, ids, temperature), z), expected)
        assert policy.token_logprobs(z.bfloat16(), ids).dtype == torch.float32

    def test_masked_columns_and_huge_logits_stay_finite(self):
        z = torch.tensor([[1e4, -1e4, -math.inf, 0.0]])
        value, grad = value_and_grad(lambda z: policy.token_logprobs(z, torch.tensor([1])), z)
        assert value.item() == pytest.approx(-2e4) and grad.isfinite().all()

    def test_advantage_without_reference_is_plain_opd(self):
        """At scale 1 the reference cancels, so none is needed, and none is read."""
        student_lp, teacher_lp = tensor([-1.0, -2.0]).requires_grad_(), tensor([-1.5, -0.5])
        advantage = policy.gopd_advantage(student_lp, teacher_lp, None, 1.0)
        assert not advantage.requires_grad
        torch.testing.assert_close(advantage, tensor([-0.5, 1.5]))
        with_reference = policy.gopd_advantage(student_lp, teacher_lp, tensor([-9.0, -9.0]), 1.0)
        torch.testing.assert_close(with_reference, advantage)

    def test_importance_weights_are_capped_and_detached(self):
        weights = clipping.truncated_importance_weights(tensor([0.0, 0.0]).requires_grad_(), tensor([-50.0, 1.0]), 2.0)
        assert not weights.requires_grad
        torch.testing.assert_close(weights, tensor([2.0, math.exp(-1.0)]))

    def test_clipped_loss_stops_the_gradient_where_it_clips(self):
        """Good tokens already more likely, bad ones already less likely, and ratios past any range."""
        old, advantage = tensor([0.0] * 5), tensor([1.0, -1.0, -1.0, 1.0, 1.0])
        logp = tensor([0.5, -0.5, 2.0, 0.1, 500.0])
        loss, grad = value_and_grad(lambda x: clipping.clipped_policy_loss(x, old, advantage), logp)
        torch.testing.assert_close(loss, tensor([-1.2, 0.8, 3.0, -math.exp(0.1), -1.2]))
        torch.testing.assert_close(grad, tensor([0.0, 0.0, 0.0, -math.exp(0.1), 0.0]))


class TestErrors:
    def test_scale_without_reference(self):
        lp = tensor([-1.0])
        with pytest.raises(ValueError, match="scale is 1.25 but reference_lp is None.*or set scale to 1"):
            policy.gopd_advantage(lp, lp, None, 1.25)
        with pytest.raises(ValueError, match="scale is 0.5 but reference_lp is None"):
            policy.sampled_token(logits(0, 1, 5), torch.tensor([1]), lp, scale=0.5)

    def test_temperature(self):
        with pytest.raises(ValueError, match="temperature is 0.0.*must be > 0"):
            policy.token_logprobs(logits(0, 1, 5), torch.tensor([1]), 0.0)

    def test_cap_and_clips(self):
        lp = tensor([-1.0])
        with pytest.raises(ValueError, match="cap is 0.0.*must be > 0"):
            clipping.truncated_importance_weights(lp, lp, 0.0)
        with pytest.raises(ValueError, match="clip is 1.5.*must lie in"):
            clipping.clipped_policy_loss(lp, lp, lp, clip=1.5)
        with pytest.raises(ValueError, match="dual_clip is 1.0.*must be > 1"):
            clipping.clipped_policy_loss(lp, lp, lp, dual_clip=1.0)
