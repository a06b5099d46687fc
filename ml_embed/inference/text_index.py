"""A corpus of texts that a model searches, held in memory."""

from collections.abc import Iterable

from ml_embed.errors import UserError
from ml_embed.inference.embedder import Embedder


class TextIndex:
    """The distinct texts of a corpus, and their vectors as documents."""

    def __init__(self, model: Embedder, texts: Iterable[str], show_progress: bool | None = None):
        """Raises UserError if there is no text; `show_progress` as in `Embedder.encode`."""
        self._model = model
        self._texts = list(dict.fromkeys(texts))
        if not self._texts:
            raise UserError("the corpus has no text to find")
        self._vectors = model.encode_document(self._texts, show_progress=show_progress)

    def __len__(self) -> int:
        return len(self._texts)

    def nearest(self, query: str, count: int) -> list[tuple[float, str]]:
        """(cosine, text) of the `count` texts that are nearest to a query, the nearest first."""
        vector = self._model.encode_query(query, show_progress=False)
        cosines = self._model.similarity(vector, self._vectors)[0]
        best, places = cosines.topk(min(count, len(self)))
        return [
            (cosine, self._texts[place])
            for cosine, place in zip(best.tolist(), places.tolist(), strict=True)
        ]
