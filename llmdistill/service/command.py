"""``llmdistill serve``: one service in this process, or a fleet of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from llmdistill.quiet import quiet
from llmdistill.service.serve import check, help_text, parsed, serve


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit status: 0 after a clean stop, 1 when the engine died."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    config = parsed(argv)
    token = os.environ.get(config.token_env) or None
    check(config, token)
    if config.ray:
        from llmdistill.service import fleet  # Ray is an extra

        return fleet.run(config, token)
    quiet()
    if config.api_processes > 1:
        from llmdistill.service import processes  # vLLM is an extra

        return processes.run(config, token)
    return asyncio.run(serve(config, token))
