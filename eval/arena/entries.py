"""All methods that meet in the arena, by name."""

import across
import methods

METHODS = {**methods.METHODS, **across.METHODS}
