"""Sparse divergences: K listed tokens and a bucket are a coarsening of the dense distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import CASES, INF, Case, golden, logits, value_and_grad

from llmdistill.objectives import divergences, sparse

every_divergence = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
anything = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


def top_k(teacher, k, student=None):
    """Ids and full-softmax log-probs of the likeliest k tokens of the teacher, or of another ranking."""
    ids = (teacher if student is None else student).topk(k).indices
    return ids, teacher.log_softmax(-1).gather(-1, ids)


def union(student_ids, teacher_ids):
    """Both lists without repetition, the gaps marked by -1."""
    repeated = (teacher_ids.unsqueeze(-1) == student_ids.unsqueeze(-2)).any(-1)
    return torch.cat([student_ids, teacher_ids.masked_fill(repeated, -1)], -1)


def with_the_mass_of(logprobs, z, ids):
    """A teacher whose evidence is these log-probs to the last bit, its unlisted tokens in the proportions of z.

    What the listed leave of 1 is known to about an ulp of 1: of a tail of 1e-14 that is 2 in 100, of which a reverse
    KL sees the logarithm. The dense side must speak of the same tail.
    """
    tail = (-logprobs.logsumexp(-1, keepdim=True).expm1()).clamp_min(torch.finfo(logprobs.dtype).eps)
    unlisted = z.scatter(-1, ids, -INF)
    rest = unlisted - unlisted.logsumexp(-1, keepdim=True) + tail.log() if ids.shape[-1] < z.shape[-1] else unlisted
    return rest.scatter(-1, ids, logprobs)


def coarse_logits(z, ids):
    """The K listed logits and the logsumexp of all others: the same softmax, coarsened, by plain autograd."""
    rest = z.scatter(-1, ids, -INF)
    return torch.cat([z.gather(-1, ids), rest.logsumexp(-1, keepdim=True)], -1)


class TestReferences:
    @pytest.mark.parametrize("case", golden("topk_divergences_trl")["cases"], ids=lambda case: case["name"])
    def test_equals_trl(self, case):
        """TRL's supports (teacher, student, union), with tail or renormalised: value and gradient to 1e-5."""
        inputs = golden("topk_divergences_trl")["inputs"]
        student, teacher, mask = inputs["student_logits"], inputs["teacher_logits"], inputs["mask"]
        student_ids, teacher_ids = student.topk(case["top_k"]).indices, teacher.topk(case["top_k"]).indices
        ids = {0.0: teacher_ids, 1.0: student_ids}.get(case["beta"], union(student_ids, teacher_ids))
        logprobs = teacher.log_softmax(-1).gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, -INF)
        tail = "bucket" if case["add_tail"] else "renormalize"

        def token_mean(z):
            return sparse.jsd(z, ids, logprobs, beta=case["beta"], tail=tail)[mask].mean()

        value, grad = value_and_grad(token_mean, student)
        assert value.item() == pytest.approx(case["expected_token_mean"], rel=1e-5, abs=1e-9)
        expected = torch.tensor(case["grad_student_logits"], dtype=torch.float64)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("case", golden("opd_estimators")["opsd_cases"], ids=lambda case: case["name"])
    def test_equals_opsd(self, case):
        """OPSD at temperature 1 and 1.1: full vocabulary, or the teacher's top 4 renormalised."""
        inputs = golden("opd_estimators")["inputs"]
        student, teacher, mask = inputs["student_logits"], inputs["teacher_logits"], inputs["mask"]
        beta, temperature, k = case["beta"], case["temperature"], case["top_k_teacher"]

        def token_mean(z):
            if k is None:
                return divergences.jsd(z, teacher, beta=beta, temperature=temperature)[mask].mean()
            # Renormalising commutes with temperature: scale the logits, then it is evidence at temperature 1.
            ids, logprobs = top_k(teacher / temperature, k)
            return sparse.jsd(z / temperature, ids, logprobs, beta=beta, tail="renormalize")[mask].mean()

        value, grad = value_and_grad(token_mean, student)
        assert value.item() == pytest.approx(case["expected"], rel=1e-5)
        expected = torch.tensor(case["grad_student_logits"], dtype=torch.float64)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)


class TestCoarsening:
    @every_divergence
    @anything
    @given(seed=seeds, width=st.integers(2, 40), data=st.data())
    def test_equals_the_dense_function_on_coarsened_rows(self, case: Case, seed, width, data):
        """Value and gradient, the gradient of the oracle by autograd through gather and logsumexp."""
        k = data.draw(st.integers(1, width - 1))
        student = logits(seed, 3, width, dtype=torch.float64)
        teacher = logits(seed + 1, 3, width, dtype=torch.float64)
        ids, logprobs = top_k(teacher, k, student if seed % 2 else None)
        torch.testing.assert_close(
            value_and_grad(lambda z: case.sparse(z, ids, logprobs), student),
            value_and_grad(lambda z: case.dense(coarse_logits(z, ids), coarse_logits(teacher, ids)), student),
            rtol=1e-7,
            atol=1e-9,
        )

    @every_divergence
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
    def test_equals_dense_when_all_tokens_are_listed(self, case: Case, dtype, tolerance):
        """K = V, with either tail: the empty bucket contributes nothing to value or gradient."""
        student, teacher = logits(0, 5, 9, scale=1.5, dtype=dtype), logits(1, 5, 9, scale=1.5, dtype=dtype)
        ids, logprobs = top_k(teacher, 9)
        expected = value_and_grad(lambda z: case.dense(z, teacher), student)
        for tail in ("bucket", "renormalize"):
            actual = value_and_grad(lambda z, t=tail: case.sparse(z, ids, logprobs, tail=t), student)
            torch.testing.assert_close(actual, expected, rtol=20 * tolerance, atol=tolerance)

    @pytest.mark.parametrize("case", [c for c in CASES if c.coarsens], ids=lambda case: case.name)
    @anything
    @given(seed=seeds, width=st.integers(2, 40), scale=st.floats(0.1, 10.0), data=st.data())
    def test_between_zero_and_dense(self, case: Case, seed, width, scale, data):
        """The data-processing inequality."""
        k = data.draw(st.integers(1, width))
        student = logits(seed, 4, width, scale=scale, dtype=torch.float64)
        teacher = logits(seed + 1, 4, width, scale=scale, dtype=torch.float64)
        ids, logprobs = top_k(teacher, k, student if seed % 2 else None)
        same_teacher = with_the_mass_of(logprobs, teacher, ids)
        value, dense = case.sparse(student, ids, logprobs), case.dense(student, same_teacher)
        assert (value >= -1e-12).all()
        assert (value <= dense * (1 + 1e-9) + 1e-9).all()

    @every_divergence
    def test_zero_if_and_only_if_the_buckets_agree(self, case: Case):
        """Differences inside the tail are invisible, value and gradient; any other is not."""
        student = logits(0, 4, 12)
        teacher = student.clone()
        ids, _ = top_k(teacher, 4)
        inside_tail = teacher.scatter(-1, ids, -INF)
        order = inside_tail.argsort(-1)  # rotate the tail's logits among its tokens
        tail_ids = order[:, 4:]
        teacher.scatter_(-1, tail_ids, teacher.gather(-1, tail_ids.roll(1, -1)))
        logprobs = teacher.log_softmax(-1).gather(-1, ids)
        value, grad = value_and_grad(lambda z: case.sparse(z, ids, logprobs), student)
        assert (student != teacher).any()
        torch.testing.assert_close(value, torch.zeros(4), rtol=0, atol=1e-5)
        if "total_variation" not in case.name:  # on its kink
            torch.testing.assert_close(grad, torch.zeros(4, 12), rtol=0, atol=1e-5)
        assert (case.sparse(student, ids, logprobs.roll(1, -1)) > 1e-4).all()

    @every_divergence
    @anything
    @given(seed=seeds, k=st.integers(1, 9))
    def test_renaming_tokens_and_reordering_the_list_change_nothing(self, case: Case, seed, k):
        student = logits(seed, 3, 10, dtype=torch.float64)
        teacher = logits(seed + 1, 3, 10, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        rename, reorder = torch.randperm(10, generator=generator), torch.randperm(k, generator=generator)
        ids, logprobs = top_k(teacher, k)
        torch.testing.assert_close(
            case.sparse(student[:, rename], rename.argsort()[ids][:, reorder], logprobs[:, reorder]),
            case.sparse(student, ids, logprobs),
            rtol=1e-6,
            atol=1e-9,
        )

    @every_divergence
    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_temperature_with_all_tokens_listed(self, case: Case, temperature):
        student, teacher = logits(0, 3, 7, dtype=torch.float64), logits(1, 3, 7, dtype=torch.float64)
        ids, logprobs = top_k(teacher, 7)
        torch.testing.assert_close(
            value_and_grad(lambda z: case.sparse(z, ids, logprobs, temperature=temperature), student),
            value_and_grad(lambda z: case.dense(z, teacher, temperature=temperature), student),
        )


class TestEvidence:
    @every_divergence
    @pytest.mark.parametrize("tail", ["bucket", "renormalize"])
    def test_padding_is_ignored(self, case: Case, tail):
        """Rows of 5, 3, 1 and 0 tokens in one tensor equal the rows taken alone; token 0 is not padding."""
        student, teacher = logits(0, 4, 9), logits(1, 4, 9)
        ids, logprobs = top_k(teacher, 5)
        ids[0, 4], logprobs[0, 4] = 0, teacher.log_softmax(-1)[0, 0]
        ids[0, :4] = torch.tensor([3, 5, 7, 8])
        logprobs[0, :4] = teacher.log_softmax(-1)[0, [3, 5, 7, 8]]
        lengths = [5, 3, 1, 0]
        padded_ids, padded_logprobs = ids.int(), logprobs.clone()
        for row, length in enumerate(lengths):
            padded_ids[row, length:], padded_logprobs[row, length:] = -1, -INF
        value, grad = value_and_grad(lambda z: case.sparse(z, padded_ids, padded_logprobs, tail=tail), student)
        for row, length in enumerate(lengths):
            if length == 0:  # nothing is known: nothing is asked
                assert value[row].abs() <= 1e-7 and grad[row].abs().max() <= 1e-7
                continue
            alone_ids, alone_logprobs = ids[row : row + 1, :length], logprobs[row : row + 1, :length]
            expected, expected_grad = value_and_grad(
                lambda z, i=alone_ids, p=alone_logprobs: case.sparse(z, i, p, tail=tail),
                student[row : row + 1],
            )
            torch.testing.assert_close(value[row : row + 1], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad[row : row + 1], expected_grad, rtol=1e-5, atol=1e-6)

    @every_divergence
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sixteen_bit_logprobs(self, case: Case, dtype):
        """Where rounding makes the listed mass exceed 1: finite, >= 0, and near the exact value."""
        student, teacher = logits(0, 64, 20, scale=2.0), logits(1, 64, 20, scale=2.0)
        ids, logprobs = top_k(teacher, 19)
        rounded = logprobs.to(dtype)
        assert (rounded.double().exp().sum(-1) > 1).any() and (rounded.double().exp().sum(-1) < 1).any()
        value, grad = value_and_grad(lambda z: case.sparse(z, ids, rounded), student)
        assert value.isfinite().all() and grad.isfinite().all() and (value >= -1e-6).all()
        # The tail itself (19 of 20 listed) is the part that rounding may hide.
        if case.name.startswith(("jsd_.", "skew_forward_kl", "total_variation")) and case.params != {"alpha": 0.0}:
            exact = case.sparse(student, ids, logprobs)
            torch.testing.assert_close(value, exact, rtol=0.05, atol=0.02)

    @every_divergence
    @anything
    @given(seed=seeds, magnitude=st.sampled_from([50.0, 300.0, 1e4]), k=st.integers(1, 7))
    def test_huge_logits_give_finite_values_and_gradients(self, case: Case, seed, magnitude, k):
        """Also where the teacher's listed mass rounds to 1 and the student's tail underflows."""
        student = logits(seed, 3, 8).sign() * magnitude
        teacher = logits(seed + 1, 3, 8).sign() * magnitude + logits(seed, 3, 8)
        value, grad = value_and_grad(lambda z: case.sparse(z, *top_k(teacher, k)), student)
        assert value.isfinite().all() and grad.isfinite().all() and (value >= -1e-6).all()

    @every_divergence
    @pytest.mark.parametrize("k", [3, 8])
    def test_a_token_impossible_on_both_sides_contributes_nothing(self, case: Case, k):
        """Listed or not: value and gradient equal those of the vocabulary without it."""
        student, teacher = logits(0, 3, 8), logits(1, 3, 8)
        student[:, [2, 5]] = teacher[:, [2, 5]] = -INF
        ids, logprobs = top_k(teacher, k)
        kept = [0, 1, 3, 4, 6, 7]
        # The same log-probs: normalised again over 6 columns they may differ by an ulp, which is much of a small tail.
        few_ids = teacher[:, kept].topk(min(k, 6)).indices
        few_logprobs = teacher.log_softmax(-1)[:, kept].gather(-1, few_ids)
        value, grad = value_and_grad(lambda z: case.sparse(z, ids, logprobs), student)
        expected, expected_grad = value_and_grad(lambda z: case.sparse(z, few_ids, few_logprobs), student[:, kept])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad[:, kept], expected_grad, rtol=1e-5, atol=1e-6)
        assert (grad[:, [2, 5]] == 0).all()

    def test_a_small_student_tail_keeps_its_precision(self):
        """1 - sum would round the student's tail of e^-40 to 0 and the forward KL to infinity."""
        student = torch.tensor([[40.0, 0.0, -2.0]])
        teacher_logprobs = torch.tensor([[0.9]]).log()
        value = sparse.forward_kl(student, torch.tensor([[0]]), teacher_logprobs)
        tail = math.log(1 + math.exp(-2.0)) - 40.0
        expected = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - tail)
        assert value.item() == pytest.approx(expected, rel=1e-5)

    @every_divergence
    def test_leading_dimensions_dtypes_and_no_rows(self, case: Case):
        student, teacher = logits(0, 2, 3, 9), logits(1, 2, 3, 9)
        ids, logprobs = top_k(teacher, 4)
        value, grad = value_and_grad(lambda z: case.sparse(z, ids.int(), logprobs), student.bfloat16())
        assert value.shape == (2, 3) and value.dtype == torch.float32 and grad.dtype == torch.bfloat16
        assert case.sparse(student[:0], ids[:0], logprobs[:0]).shape == (0, 3)


class TestErrors:
    @every_divergence
    def test_temperature_needs_the_whole_vocabulary(self, case: Case):
        ids, logprobs = top_k(logits(1, 2, 5), 4)
        with pytest.raises(ValueError, match=r"temperature is 2.0, but the teacher lists 4 of 5.*list the whole"):
            case.sparse(logits(0, 2, 5), ids, logprobs, temperature=2.0)
        with pytest.raises(ValueError, match=r"temperature is 0.0.*must be > 0"):
            case.sparse(logits(0, 2, 5), ids, logprobs, temperature=0.0)

    def test_tail(self):
        with pytest.raises(ValueError, match="tail is 'clamp'; it must be one of bucket, renormalize"):
            sparse.forward_kl(logits(0, 2, 5), *top_k(logits(1, 2, 5), 4), tail="clamp")

    def test_shapes(self):
        ids, logprobs = top_k(logits(1, 2, 5), 4)
        with pytest.raises(ValueError, match=r"\(2, 4\), topk_logprobs \(2, 3\)"):
            sparse.forward_kl(logits(0, 2, 5), ids, logprobs[:, :3])
        with pytest.raises(ValueError, match=r"\(2, 4\), student logits \(3, 5\).*same rows"):
            sparse.forward_kl(logits(0, 3, 5), ids, logprobs)

    def test_parameters_are_checked_as_in_the_dense_functions(self):
        evidence = top_k(logits(1, 2, 5), 4)
        for call, message in (
            (lambda z: sparse.jsd(z, *evidence, beta=2.0), "beta is 2.0"),
            (lambda z: sparse.skew_forward_kl(z, *evidence, alpha=1.0), "alpha is 1.0"),
            (lambda z: sparse.skew_reverse_kl(z, *evidence, alpha=1.0), "alpha is 1.0"),
            (lambda z: sparse.adaptive_kl(z, *evidence, head_mass=0.0), "head_mass is 0.0"),
            (lambda z: sparse.f_divergence(z, *evidence, name="peerson_chi2"), "did you mean 'pearson_chi2'"),
        ):
            with pytest.raises(ValueError, match=message):
                call(logits(0, 2, 5))
