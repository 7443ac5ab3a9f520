"""numpy as the tests may trust it: comparisons that something empty does not pass."""

from __future__ import annotations

import sys
import warnings
from typing import Any


def strict_comparisons() -> None:
    """numpy broadcasts, so that [] is close to every number, and the plus suites' oracle would take [] for any float.
    Here allclose wants equal shapes, and nothing empty is close or equal to what is not; an empty array has no truth
    (numpy before 2.2 takes it for false, so that ``if result != expected: fail()`` would not fail).

    Acts on this process, for good, where numpy is loaded (the fork server loads it where it is installed)."""
    if "numpy" not in sys.modules:
        return
    import numpy
    import numpy.testing

    if [int(part) for part in numpy.__version__.split(".")[:2]] < [2, 2]:
        warnings.filterwarnings("error", message="The truth value of an empty array")

    def strict(compare: Any, differs: Any, fail: Any) -> Any:
        def compared(a: Any, b: Any, *args: Any, **keywords: Any) -> Any:
            return fail() if differs(a, b) else compare(a, b, *args, **keywords)

        return compared

    def emptiness(a: Any, b: Any) -> bool:
        return bool((numpy.size(a) == 0) != (numpy.size(b) == 0))

    def shape(a: Any, b: Any) -> bool:
        return bool(numpy.shape(a) != numpy.shape(b))

    def error() -> Any:
        raise AssertionError("something empty is compared with something that is not")

    numpy.allclose = strict(numpy.allclose, shape, lambda: False)
    numpy.isclose = strict(numpy.isclose, emptiness, lambda: numpy.False_)
    for name in ("assert_allclose", "assert_equal", "assert_almost_equal", "assert_array_almost_equal"):
        setattr(numpy.testing, name, strict(getattr(numpy.testing, name), emptiness, error))
    numpy.testing.assert_array_equal = strict(numpy.testing.assert_array_equal, emptiness, error)
