"""Nested (3-Dimensional Matryoshka) multilingual text embeddings on Qwen3 backbones.

Importing the package does nothing heavy: `Embedder` is loaded on first use.
"""

__version__ = "0.1.0"
__all__ = ["Embedder"]


def __getattr__(name: str):
    if name == "Embedder":
        from ml_embed.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
