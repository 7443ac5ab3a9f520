"""What importing costs, and the thread count that is measured."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import llmdistill
from llmdistill.threads import best_thread_count


def test_importing_the_package_is_cheap_and_loads_nothing_heavy() -> None:
    """Under 0.3 s; the best of three, since a busy machine can only make it slower."""
    code = (
        "import time, sys; t = time.perf_counter(); import llmdistill; dir(llmdistill); "
        "print(time.perf_counter() - t, [m for m in ('torch', 'transformers', 'vllm', 'trl') if m in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds, heavy = zip(*(run.stdout.split(maxsplit=1) for run in runs), strict=True)
    assert min(float(s) for s in seconds) < 0.3
    assert {h.strip() for h in heavy} == {"[]"}


def test_every_public_name_is_there() -> None:
    for name in llmdistill.__all__:
        assert getattr(llmdistill, name).__name__ == name


def test_the_thread_count_is_one_or_all() -> None:
    assert best_thread_count() in (1, len(os.sched_getaffinity(0)))


def test_imports_of_modules_make_no_circle_lazy_ones_included() -> None:
    """Wherever the statement stands: at the top, in a function, or for type checkers alone."""
    package = Path(llmdistill.__file__).parent
    names = {
        ".".join(("llmdistill", *file.relative_to(package).with_suffix("").parts)): file
        for file in package.rglob("*.py")
    }

    def imported(file: Path) -> set[str]:
        found = set[str]()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmdistill"):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        return found & names.keys()

    graph = {name: imported(file) for name, file in names.items()}
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    while roots := graph.keys() - {other for others in graph.values() for other in others}:  # they only lead there
        graph = {name: others for name, others in graph.items() if name not in roots}
    assert sorted(graph) == []
