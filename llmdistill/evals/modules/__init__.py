r"""Our metrics as modules of the Hugging Face ``evaluate`` library; they work offline.

    metric = evaluate.load(module_path("pass_at_k"))
    metric.compute(predictions=[["so \\boxed{4}", "so \\boxed{5}"]], references=["4"], k=[1, 2])

Without ``load``, which copies code into a cache: ``from llmdistill.evals.modules.pass_at_k.pass_at_k import PassAtK``.
"""

from __future__ import annotations

from pathlib import Path


def module_path(name: str) -> str:
    """The folder of a module, for ``evaluate.load``.

    Raises:
        ValueError: there is no such module.
    """
    here = Path(__file__).parent
    names = sorted(p.name for p in here.iterdir() if (p / f"{p.name}.py").is_file())
    if name not in names:
        raise ValueError(f"no metric module {name!r}; there are {', '.join(names)}")
    return str(here / name)
