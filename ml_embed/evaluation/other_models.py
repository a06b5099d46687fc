"""Models of other kinds on test sets: static ones, and all that sentence-transformers reads.

Letters: N texts, D vector length.
"""

from pathlib import Path
from typing import Any

import torch

from ml_embed.evaluation.cube import MAX_QUERIES
from ml_embed.evaluation.data import behind_prompts, read_test_sets
from ml_embed.evaluation.metrics import metrics_of_ranks
from ml_embed.inference.encoding import check_finite
from ml_embed.inference.text_models import TextModel


def evaluate_model(
    model: TextModel, data: str | Path, max_queries: int | None = MAX_QUERIES
) -> list[dict[str, Any]]:
    """A model's retrieval metrics, uncut, on every test set of `data`, as `evaluate_cube` reads it.

    Queries and documents get the model's own prompts (`behind_prompts`).

    Returns:
        one JSON-able object for each test set: dataset, split, dim, recall@1, mrr@10, ndcg@10.
    Raises:
        UserError: the data cannot be read, or a vector is not finite.
    """
    texts, test_sets = behind_prompts(*read_test_sets(Path(data), max_queries), model.prompts)
    vectors = model.encode(texts.texts)  # (N, D)
    check_finite(vectors, texts.texts, f"{model.name} gives NaN or infinity")
    unit = torch.from_numpy(vectors).to(model.device)
    return [
        {"dataset": test_set.dataset, "split": test_set.split, "dim": model.dim}
        | metrics_of_ranks(test_set.ranks(unit))
        for test_set in test_sets
    ]
