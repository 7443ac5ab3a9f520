"""Verdicts on what models answer: maths and multiple choice (math.py), programs (code.py)."""
