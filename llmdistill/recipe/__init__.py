"""Settings, YAML and command line; what a launch may get wrong. Imports nothing of ours but errors."""
