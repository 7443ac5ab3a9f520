"""Our metrics within the ``evaluate`` library: loaded from their folder without a network, imported, combined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("evaluate")

from llmdistill.evals.modules import module_path

COMPLETIONS = [
    [r"so \boxed{\frac12}", r"\boxed{0.5}", r"\boxed{3}", r"\boxed{4}"],  # 2 of 4 right, in two spellings
    [r"\boxed{7}", r"\boxed{8}", r"\boxed{8}", "no idea"],  # 1 of 4 right, outvoted
]
GOLD = ["1/2", "7"]
EXPECTED = {
    "pass_at_k": {"pass_at_1": 3 / 8, "pass_at_4": 1.0},
    "maj_at_k": {"maj_at_1": 3 / 8, "maj_at_4": 0.5},
}

LOADED = """
import evaluate, json, sys
from llmdistill.evals.modules import module_path
completions, gold = json.loads(sys.argv[1])
if __name__ == "__main__":
    found = {n: evaluate.load(module_path(n)).compute(predictions=completions, references=gold, k=[1, 4])
             for n in ("pass_at_k", "maj_at_k")}
    found["math_equivalence"] = evaluate.load(module_path("math_equivalence")).compute(
        predictions=completions[0], references=["1/2"] * 4)
    print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))


def test_load_from_the_folder_without_a_network(tmp_path: Path) -> None:
    import json

    environment = {**os.environ, "HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    words = [sys.executable, "-c", LOADED, json.dumps([COMPLETIONS, GOLD])]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, expected in EXPECTED.items():
        assert found[name] == pytest.approx(expected)
    assert found["math_equivalence"] == {"math_equivalence": 0.5}


def test_imported_classes_combine_and_take_batches() -> None:
    import evaluate

    from llmdistill.evals.modules.maj_at_k.maj_at_k import MajAtK
    from llmdistill.evals.modules.math_equivalence.math_equivalence import MathEquivalence
    from llmdistill.evals.modules.pass_at_k.pass_at_k import PassAtK

    both = evaluate.combine([PassAtK(), MajAtK()])
    got = both.compute(predictions=COMPLETIONS, references=GOLD, k=[1, 4])
    assert got == pytest.approx(EXPECTED["pass_at_k"] | EXPECTED["maj_at_k"])
    metric = MathEquivalence()
    metric.add_batch(predictions=COMPLETIONS[0], references=["1/2"] * 4)
    metric.add(prediction=r"\boxed{7}", reference="7")
    assert metric.compute(verdicts=True) == {"math_equivalence": 0.6, "verdicts": [True, True, False, False, True]}


def test_too_few_completions_are_refused() -> None:
    from llmdistill.evals.modules.pass_at_k.pass_at_k import PassAtK

    with pytest.raises(ValueError, match="pass@8 needs at least 8"):
        PassAtK().compute(predictions=COMPLETIONS, references=GOLD, k=8)


def test_module_path_names_the_modules_there_are() -> None:
    assert Path(module_path("pass_at_k")).name == "pass_at_k"
    with pytest.raises(ValueError, match="maj_at_k, math_equivalence, pass_at_k"):
        module_path("bleu")
