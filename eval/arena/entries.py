"""All methods that meet in the arena, by name."""

import across
import methods
import recovery_methods

METHODS = {**methods.METHODS, **across.METHODS, **recovery_methods.METHODS}
