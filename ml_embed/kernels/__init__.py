"""How the layers of transformers' Qwen3 run fast: attention, norms, compiling. Results stay those
of its own code."""
