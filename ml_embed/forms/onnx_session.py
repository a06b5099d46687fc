"""An exported graph in onnxruntime: texts to vectors.

Letters: N texts, B texts of a batch, S their longest length, D vector length.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ml_embed.forms.onnx_graph import INPUTS, OUTPUT
from ml_embed.prepare.tokenizer import TextTokenizer

BATCH = 16


class OnnxModel:
    """A graph that `export_onnx` wrote, with the tokenizer of its model."""

    def __init__(self, path: Path, text_tokenizer: TextTokenizer):
        from onnxruntime import InferenceSession

        self._session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._text_tokenizer = text_tokenizer

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32 unit vectors."""
        token_ids = self._text_tokenizer(list(texts))
        order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
        rows: list[np.ndarray] = [np.empty(0)] * len(order)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            for place, row in zip(chosen, self._run([token_ids[i] for i in chosen]), strict=True):
                rows[place] = row
        return np.stack(rows)

    def _run(self, token_ids: Sequence[np.ndarray]) -> np.ndarray:
        shape = len(token_ids), max(map(len, token_ids))  # (B, S)
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, own in enumerate(token_ids):
            ids[row, : len(own)], mask[row, : len(own)] = own, 1
        return self._session.run([OUTPUT], dict(zip(INPUTS, (ids, mask), strict=True)))[0]
