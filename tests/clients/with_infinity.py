"""infinity's engine, without its server."""

import asyncio

from client import run
from infinity_emb import AsyncEmbeddingEngine, EngineArgs


def encode(folder, texts):
    return asyncio.run(_encode(folder, texts)), None


async def _encode(folder, texts):
    arguments = EngineArgs(
        model_name_or_path=folder,
        engine="torch",
        device="cpu",
        dtype="float32",
        bettertransformer=False,
    )
    engine = AsyncEmbeddingEngine.from_args(arguments)
    async with engine:
        vectors, _ = await engine.embed(sentences=texts)
    return vectors


run(encode, "infinity-emb", "transformers")
