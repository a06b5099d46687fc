"""onnxruntime and tokenizers alone: nothing else is needed."""

import json
from pathlib import Path

import numpy as np
from client import run
from onnxruntime import InferenceSession
from tokenizers import Tokenizer


def encode(folder, texts):
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(settings["model_max_length"])
    tokenizer.enable_padding()
    batch = tokenizer.encode_batch(texts)
    session = InferenceSession(f"{folder}/onnx/model.onnx")
    inputs = {
        "input_ids": np.array([one.ids for one in batch]),
        "attention_mask": np.array([one.attention_mask for one in batch]),
    }
    return session.run(["sentence_embedding"], inputs)[0], None


run(encode, "onnxruntime", "tokenizers")
