"""How the layers of transformers' Qwen3 run fast, with the same results: attention, norms."""
