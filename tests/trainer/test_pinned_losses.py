"""Recipes whose losses stay what they were: six steps of tiny models, sampled and trained from fixed seeds.

The numbers are those of the code before texts, judges and terms (commit 1caeb1d), which the composition repeats to the
bit on one machine. A change of them is a change of what is trained, and belongs into the changelog.

Another processor sums in another order. Adam with its usual epsilon of 1e-8 makes a whole step of a gradient that is
rounding only, and the six losses then differ by up to 1e-3 between processors; with 1e-4 they differ by 3e-5 at most
over the instruction sets of one (SSE 4.2, AVX2, AVX-512), and the tolerance is 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, TAIDConfig, TAIDTrainer
from llmdistill.redi import REDIConfig, REDITrainer
from tests import tiny
from tests.trainer.pair_cases import pair_rows

# Two micro-batches a step, and no clipping, which would hide a wrong scale.
COMMON: dict[str, Any] = dict(
    max_steps=6,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    logging_steps=1,
    save_strategy="no",
    max_grad_norm=0.0,
    adam_epsilon=1e-4,
)


def opd(out: str, samples: int = 1, **settings: Any) -> Any:
    rollouts = RolloutConfig(max_new_tokens=8, samples_per_prompt=samples)
    args = OPDConfig(output_dir=out, rollouts=rollouts, **COMMON, **settings)
    rows, tok = tiny.rows(16), tiny.tokenizer()
    return OPDTrainer(tiny.llama(1), args, tiny.llama(2), train_dataset=rows, processing_class=tok)


def taid(out: str, **settings: Any) -> Any:
    args, rows, tok = TAIDConfig(output_dir=out, **COMMON, **settings), tiny.rows(16), tiny.tokenizer()
    return TAIDTrainer(tiny.llama(1), args, tiny.llama(2), train_dataset=rows, processing_class=tok)


def redi(out: str, **settings: Any) -> Any:
    args = REDIConfig(output_dir=out, **COMMON, **settings)
    return REDITrainer(tiny.llama(1), args, train_dataset=pair_rows(16), processing_class=tiny.tokenizer())


FASTER = {"t_driver": "cross_entropy", "t_rate": 0.1, "t_momentum": 0.5, "t_start": 0.2}
RECIPES: dict[str, tuple[Callable[..., Any], dict[str, Any], list[float]]] = {
    "opd full jsd": (
        opd,
        {"divergence": "jsd", "beta": 0.3},
        [0.35564506, 0.34090415, 0.33446521, 0.33125615, 0.32882881, 0.32486424],
    ),
    "opd top_k": (
        opd,
        {"estimator": "top_k", "top_k": 8},
        [0.41372839, 0.47329915, 0.48160273, 0.44155818, 0.47973096, 0.43266392],
    ),
    "opd top_k student": (
        opd,
        {"estimator": "top_k", "top_k": 8, "support": "student"},
        [1.3901507, 1.2586918, 1.1880128, 1.2050533, 0.88730657, 0.8692888],
    ),
    "opd sampled, weighed with cap 5": (
        opd,
        {"estimator": "sampled", "samples": 2},
        [-8.1755848, -8.350029, -9.9695635, -11.589537, -10.051401, -8.144104],
    ),
    "taid": (
        taid,
        {},
        [0.45008647, 0.40581867, 0.82650501, 1.0498306, 1.2493401, 1.4709923],
    ),
    "taid driven by the cross-entropy": (
        taid,
        FASTER,
        [0.11036677, 0.10247512, 0.4939158, 0.77478468, 1.0541961, 1.4173645],
    ),
    "taid forward_kl": (
        taid,
        {"divergence": "forward_kl"},
        [2.7809103, 2.413491, 2.3032861, 2.1609356, 1.9869128, 1.7989352],
    ),
    "redi": (
        redi,
        {},
        [0.7765187, -0.80085671, -0.20741856, -0.67538035, -0.28885174, -4.0882473],
    ),
    "redi simpo": (
        redi,
        {"method": "simpo"},
        [0.97867584, 0.42320839, 1.1307261, 0.4572638, 0.091059171, 0.002177679],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_those_of_before(tmp_path: Path, name: str) -> None:
    assert losses(tmp_path, name) == pytest.approx(RECIPES[name][2], rel=1e-4)


@pytest.mark.parametrize("name", ["opd full jsd", "opd top_k student", "taid", "redi"])
def test_packed_they_are_the_same(tmp_path: Path, name: str) -> None:
    """Sampled, asked about and trained on."""
    assert losses(tmp_path, name, packing=True) == pytest.approx(RECIPES[name][2], rel=1e-4)


def losses(folder: Path, name: str, **more: Any) -> list[float]:
    make, settings, _ = RECIPES[name]
    t = make(str(folder), **settings, **more)
    t.train()
    return [line["loss"] for line in t.state.log_history if "loss" in line]
