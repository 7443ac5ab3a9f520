"""Evaluation: metrics with confidence intervals."""
