"""Nested (3-Dimensional Matryoshka) multilingual text embeddings on Qwen3 backbones.

Importing the package does nothing heavy: `Embedder` is loaded on first use.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Embedder"]


def __getattr__(name: str) -> Any:
    if name == "Embedder":
        from ml_embed.inference.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
