"""A trained model in 8 or 4 bits, as a directory that vLLM loads, and what that costs on held-out text."""
