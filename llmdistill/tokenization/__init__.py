"""Tokenizers: special tokens, comparison and, later, alignment."""
