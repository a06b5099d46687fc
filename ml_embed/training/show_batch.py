"""Global batches as text: what a run will really train on, before it does."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ml_embed.data.batch import ContrastiveBatch
from ml_embed.data.loader import Loader


def show_batches(loader: Loader, tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[str]:
    """The first `count` global batches, whatever the number of processes, each as one text."""
    whole = replace(loader, builder=replace(loader.builder, process=0, processes=1))
    for step, batch in enumerate(whole.training_batches(range(count)), start=1):
        yield "\n".join(_lines(step, batch, tokenizer))


def _lines(step: int, batch: ContrastiveBatch, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    texts = [
        _decoded(tokenizer, ids) for ids in batch.texts.input_ids.split(batch.texts.packed.lengths)
    ]
    rows = len(batch.query)
    yield f"step {step}: {batch.dataset} ({batch.task}), {rows} rows, {batch.num_tokens} tokens"
    for row in range(rows):
        yield f"  {row + 1}. query     {texts[batch.query[row]]}"
        yield f"     passage   {texts[batch.passage[row]]}"
        for place in (batch.negative_documents[row] >= 0).nonzero().flatten().tolist():
            masked = "  [masked]" if batch.excluded_candidates[row, 1 + place] else ""
            yield f"     negative  {texts[batch.negatives[row, place]]}{masked}"
        if batch.scores is not None:
            yield f"     score     {batch.scores[row]:g}"
        if batch.excluded_passages is not None and batch.excluded_passages[row].any():
            out = _rows(batch, batch.excluded_passages[row])
            yield f"     masked    the documents of {out}, which are right answers too"


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    """A text on one line, special tokens and all."""
    text = str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _rows(batch: ContrastiveBatch, mask: Tensor) -> str:
    """The rows, counted from 1, of those in-batch documents that a mask names: "2, 5"."""
    places = mask.nonzero().flatten()
    if batch.in_batch_documents is not None:
        places = batch.in_batch_documents[places] // (1 + batch.negatives.shape[1])
    return ", ".join(str(row + 1) for row in sorted(set(places.tolist())))
