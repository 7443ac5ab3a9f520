"""Processes of their own, to be killed: forked from one that has imported what they need, once for all tests."""

from __future__ import annotations

import multiprocessing

STEPS = ("verification", "pairs", "curation", "decontamination", "cards", "generate_command", "engines.endpoint")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [*(f"llmdistill.datagen.{name}" for name in STEPS), "pyarrow", "tests.datagen.test_kills"]
)
