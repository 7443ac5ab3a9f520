"""eval/arena is a folder of scripts that import one another by name, as they do when run.py is started."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "eval" / "arena"))
