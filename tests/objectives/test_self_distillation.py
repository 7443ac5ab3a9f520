"""SDPO and OPSD are compositions of what is there: their published values, by the functions that training calls."""

from functools import partial

import pytest
import torch
from objective_cases import golden, value_and_grad

from llmdistill.objectives import divergences, sparse
from llmdistill.objectives.composed import on_samples
from llmdistill.objectives.sampler import token_logprobs


def sdpo(alpha, tail, cap):
    """Generalised JSD times sg[min(S / S_old, cap)]: SDPO's alpha is beta of `sparse.jsd`, the teacher's share."""
    return on_samples(partial(sparse.jsd, beta=alpha, tail=tail), cap=cap)


def check(found, case):
    assert found[0].item() == pytest.approx(case["loss"], rel=1e-5)
    expected = torch.tensor(case["grad_student_logits"], dtype=torch.float64)
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-8)


def evidence(i, teacher, k):
    """The student's top-k with the teacher's log-probs, and what is known of the sampled tokens."""
    ids = i["student_logits"].topk(k).indices
    listed = teacher.log_softmax(-1).gather(-1, ids)
    return ids, listed, i["tokens"], token_logprobs(i["old_logits"], i["tokens"])


@pytest.mark.parametrize("case", golden("sdpo")["cases"], ids=lambda c: f"{c['alpha']}_{c['top_k']}_{c['add_tail']}")
def test_sdpo(case):
    i = golden("sdpo")["inputs"]
    counted = i["mask"]
    if case["sample_mask"]:  # rows without a successful sibling or feedback
        counted = counted & torch.tensor(case["sample_mask"]).bool()[:, None]
    tail = "bucket" if case["add_tail"] else "renormalize"
    loss = sdpo(case["alpha"], tail, golden("sdpo")["defaults"]["yaml"]["is_clip"])
    given = evidence(i, i["teacher_logits"], case["top_k"] or i["student_logits"].shape[-1])
    check(value_and_grad(lambda z: loss(z, *given)[counted].mean(), i["student_logits"]), case)


def privileged(method):
    return [c for c in golden("privileged_context")["cases"] if c["method"].startswith(method)]


@pytest.mark.parametrize(
    "case", [c for c in privileged("SDPO") if "top_k" in c["params"]], ids=lambda c: str(c["params"])
)
def test_sdpo_of_another_project(case):
    data, params = golden("privileged_context"), case["params"]
    i, teacher = data["inputs"], data["inputs"]["teacher_logits_correct_context"]
    given = evidence(i, teacher, params["top_k"] or teacher.shape[-1])
    loss = sdpo(params["alpha"], "bucket" if params["add_tail"] else "renormalize", params["is_clip"])
    check(value_and_grad(lambda z: loss(z, *given)[i["mask"]].mean(), i["student_logits"]), case)


def test_opsd():
    """Without the later clip of single vocabulary terms, which makes a divergence negative (METHODS-2026 9.2.1)."""
    (case,) = [c for c in privileged("OPSD") if not c["params"]["jsd_token_clip"]]
    i = golden("privileged_context")["inputs"]
    loss = partial(divergences.jsd, teacher_logits=i["teacher_logits_correct_context"], beta=case["params"]["beta"])
    check(value_and_grad(lambda z: loss(z)[i["mask"]].mean(), i["student_logits"]), case)


def test_the_defaults_are_the_authors():
    assert golden("sdpo")["defaults"]["yaml"]["alpha"] == 0.5 and golden("sdpo")["defaults"]["yaml"]["topk"] == 100


def test_an_empty_hint_and_equal_weights_have_no_loss():
    """METHODS-2026 9.2: with nothing privileged the teacher is the student, on fresh samples the ratio is 1."""
    i = golden("sdpo")["inputs"]
    i["old_logits"] = i["student_logits"]
    given = evidence(i, i["student_logits"], 3)
    value, grad = value_and_grad(lambda z: sdpo(0.5, "bucket", 2.0)(z, *given), i["student_logits"])
    assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12
