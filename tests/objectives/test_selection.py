"""Selections of tokens: the published scores and masks, and that they are those of the whole batch."""

import pytest
import torch
from objective_cases import INF, golden, logits, value_and_grad

from llmdistill.objectives import divergences, sparse
from llmdistill.objectives.entropy_aware import entropy_aware
from llmdistill.objectives.policy import policy_gradient, sampled_token
from llmdistill.objectives.sampler import token_logprobs
from llmdistill.objectives.selection import (
    entropy,
    extremes,
    first_tokens,
    keep_top,
    not_in,
    opsa_advantages,
    tip_scores,
)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def scattered(values_N, mask):
    """[B, T] with the counted rows in place and 0 elsewhere, as the reference files have it."""
    return torch.zeros(mask.shape, dtype=values_N.dtype).masked_scatter(mask, values_N)


class TestTIP:
    @pytest.mark.parametrize("case", golden("tip")["cases"], ids=lambda c: c["mode"])
    def test_scores_selection_loss_and_gradient(self, case):
        i = golden("tip")["inputs"]
        mask, student, teacher = i["mask"], i["student_logits"], i["teacher_logits"]
        h_N, d_N = entropy(student[mask]), divergences.reverse_kl(student, teacher)[mask]
        torch.testing.assert_close(h_N, float64(case["student_entropy"])[mask], rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(d_N, float64(case["divergence"])[mask], rtol=1e-7, atol=1e-8)
        constant = torch.zeros_like(h_N)
        both = {"soft_or": (h_N, d_N), "entropy": (h_N, constant), "divergence": (constant, d_N)}[case["mode"]]
        scores = tip_scores(*both)
        torch.testing.assert_close(scattered(scores, mask), float64(case["score"]), rtol=1e-7, atol=1e-8)
        kept = scattered(keep_top(scores, case["rho"]), mask)
        assert kept.int().tolist() == case["kept"]
        value, grad = value_and_grad(lambda z: divergences.reverse_kl(z, teacher)[kept].mean(), student)
        assert value.item() == pytest.approx(case["loss"], rel=1e-6)
        torch.testing.assert_close(grad, float64(case["grad_student_logits"]), rtol=1e-6, atol=1e-8)

    def test_shards_with_global_extremes_score_like_the_whole(self):
        h, d = logits(0, 20).abs(), logits(1, 20).abs()
        whole = tip_scores(h, d)
        parts = [slice(0, 3), slice(3, 20)]
        found = torch.stack([extremes(h[p], d[p]) for p in parts])
        everywhere = torch.stack([found[:, 0].amin(0), found[:, 1].amax(0)])
        assert torch.equal(torch.cat([tip_scores(h[p], d[p], everywhere) for p in parts]), whole)
        assert not torch.allclose(torch.cat([tip_scores(h[p], d[p]) for p in parts]), whole)
        assert whole.min() >= 0 and whole.max() <= 1


def test_keep_top_is_exact_deterministic_and_keeps_one():
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    assert keep_top(scores, 0.4).tolist() == [False, True, True, False, False]
    assert keep_top(scores, 0.01).sum() == 1 and keep_top(scores, 1.0).all()
    assert keep_top(torch.arange(100.0), 0.29).sum() == 29
    assert keep_top(torch.zeros(0), 0.5).tolist() == []
    for fraction in (0.0, 1.1):
        with pytest.raises(ValueError, match="fraction is"):
            keep_top(scores, fraction)


def test_prefix_and_special_tokens():
    assert first_tokens(torch.tensor([0, 1, 2, 0, 1]), 2).tolist() == [True, True, False, True, True]
    i, expected = golden("revisiting_opd")["inputs"], golden("revisiting_opd")["special_token_mask"]
    found = not_in(i["tokens"], expected["masked_ids"]) & i["mask"]
    # The released code keeps a second occurrence in a row (the last token of the first one); here none counts.
    assert expected["kept"][0] == [1, 0, 1, 0, 1] and found.int().tolist() == [[1, 0, 1, 0, 0], expected["kept"][1]]
    assert not_in(i["tokens"], []).all()


# Its other variants are no divergences.
RENORMALISED = [
    c for c in golden("revisiting_opd")["cases"] if c["norm_to_one"] and not c["tail"] and not c["clip_log_ratio_5"]
]


class TestRevisitingOPD:
    def test_entropy_mask_per_sample(self):
        data = golden("revisiting_opd")
        i, expected = data["inputs"], data["entropy_top_mask"]
        found = entropy(i["student_logits"])
        torch.testing.assert_close(found, float64(expected["entropies"]), rtol=1e-7, atol=1e-8)
        rows = [scattered(keep_top(h[m], expected["ratio"]), m) for h, m in zip(found, i["mask"], strict=True)]
        assert torch.stack(rows).double().tolist() == expected["kept"]

    @pytest.mark.parametrize("case", RENORMALISED, ids=lambda c: f"top_{c['K']}")
    def test_its_loss_is_the_renormalised_sparse_reverse_kl(self, case):
        i = golden("revisiting_opd")["inputs"]
        lp, ids = i["teacher_logits"].log_softmax(-1).topk(case["K"])

        def loss(z):
            return sparse.reverse_kl(z, ids, lp, tail="renormalize")

        expected = float64(case["per_token"])
        torch.testing.assert_close(loss(i["student_logits"])[i["mask"]], expected[i["mask"]], rtol=1e-6, atol=1e-8)
        value, grad = value_and_grad(lambda z: loss(z)[i["mask"]].mean(), i["student_logits"])
        assert value.item() == pytest.approx(case["loss"], rel=1e-6)
        torch.testing.assert_close(grad, float64(case["grad_student_logits"]), rtol=1e-6, atol=1e-8)


class TestOPSA:
    @pytest.mark.parametrize("case", golden("fixed_negative_control")["cases"], ids=lambda c: c["mode"])
    def test_advantages_loss_and_gradient(self, case):
        i = golden("fixed_negative_control")["inputs"]
        mask, student, tokens = i["mask"], i["student_logits"], i["tokens"]
        h_N = entropy(student)[mask] if case["mode"] == "entropy" else None
        advantage_N = opsa_advantages(token_logprobs(student, tokens)[mask], h_N, fraction=case["token_fraction"])
        torch.testing.assert_close(scattered(advantage_N, mask), float64(case["advantages"]), rtol=1e-7, atol=1e-8)

        def loss(z):
            return policy_gradient(z[mask], tokens[mask], advantage_N).sum() / (advantage_N != 0).sum()

        value, grad = value_and_grad(loss, student)
        assert value.item() == pytest.approx(case["loss"], rel=1e-6)
        torch.testing.assert_close(grad, float64(case["grad_student_logits"]), rtol=1e-6, atol=1e-8)

    def test_equal_entropies_take_the_strongest(self):
        found = opsa_advantages(float64([-1, -5, -4, -2, -3]), torch.ones(5), fraction=0.4)
        assert found.tolist() == [0.0, -1.0, -1.0, 0.0, 0.0]


class TestEntropyAware:
    def evidence(self, n=4, k=3):
        student, teacher = (logits(seed, n, 7, scale=1.5, dtype=torch.float64) for seed in (0, 1))
        teacher[0] *= 10  # sure of itself
        lp, ids = teacher.log_softmax(-1).topk(k)
        return student, teacher, torch.tensor([1, 4, 6, 0]), ids, lp

    def test_written_out(self):
        student, teacher, tokens, ids, lp = self.evidence()
        h = entropy(teacher)
        assert h[0] < 0.8 and (h > 0.8).any()
        teacher_lp = token_logprobs(teacher, tokens)

        def plain(z):
            log_s, log_t = z.log_softmax(-1), teacher.log_softmax(-1)
            rows = []
            for i in range(4):
                own = log_s[i, tokens[i]]
                value = -(log_t[i, tokens[i]] - own).detach() * own
                if h[i] > 0.8:
                    value = value + sum(log_t[i, v].exp() * (log_t[i, v] - log_s[i, v]) for v in ids[i].tolist())
                rows.append(value)
            return torch.stack(rows)

        found = value_and_grad(lambda z: entropy_aware(z, tokens, teacher_lp, ids, lp, h), student)
        torch.testing.assert_close(found, value_and_grad(plain, student))

    def test_padding_thresholds_and_impossible_tokens(self):
        student, teacher, tokens, ids, lp = self.evidence()
        teacher_lp, h = token_logprobs(teacher, tokens), entropy(teacher)
        expected = value_and_grad(lambda z: entropy_aware(z, tokens, teacher_lp, ids, lp, h), student)
        longer = torch.cat([ids, torch.full((4, 1), -1)], -1), torch.cat([lp, torch.zeros(4, 1)], -1)
        found = value_and_grad(lambda z: entropy_aware(z, tokens, teacher_lp, *longer, h), student)
        torch.testing.assert_close(found, expected)
        never = entropy_aware(student, tokens, teacher_lp, ids, lp, h, threshold=99.0)
        torch.testing.assert_close(never, sampled_token(student, tokens, teacher_lp))
        blind = student.index_fill(1, torch.tensor([2]), -INF)
        lp_0 = lp.masked_fill(ids == 2, -INF)
        value, grad = value_and_grad(lambda z: entropy_aware(z, tokens, teacher_lp, ids, lp_0, h), blind)
        assert value.isfinite().all() and grad.isfinite().all()

    def test_a_full_list_at_an_equal_teacher_has_no_loss(self):
        student, _, tokens, *_ = self.evidence()
        lp, ids = student.log_softmax(-1).topk(7)
        own, h = token_logprobs(student, tokens), torch.full((4,), 1.0)
        value, grad = value_and_grad(lambda z: entropy_aware(z, tokens, own, ids, lp, h), student)
        assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12


def test_entropy():
    z = logits(0, 5, 9)
    torch.testing.assert_close(entropy(z), torch.distributions.Categorical(logits=z).entropy())
    torch.testing.assert_close(entropy(z, temperature=2.0), torch.distributions.Categorical(logits=z / 2).entropy())
    assert entropy(torch.tensor([[1e4, -INF, 0.0]])).item() == 0.0
    assert not entropy(z.requires_grad_()).requires_grad
