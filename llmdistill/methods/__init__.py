"""One file per method: its settings, and the composition they name."""
