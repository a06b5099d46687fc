"""FastEmbed, which is what Qdrant's client computes vectors with, and a custom model."""

from client import run
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType


def encode(folder, texts):
    TextEmbedding.add_custom_model(
        model="own/model",
        pooling=PoolingType.DISABLED,  # the graph pools and normalises
        normalization=False,
        sources=ModelSource(hf="own/model"),
        dim=16,
        model_file="onnx/model.onnx",
    )
    model = TextEmbedding("own/model", specific_model_path=folder)
    return list(model.embed(texts)), None


run(encode, "fastembed", "onnxruntime")
