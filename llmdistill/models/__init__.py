"""Loading, heads, weights under every wrapper, generation by transformers."""
