"""How many texts per second a model encodes here, of each language; measured once and kept."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_embed.files.atomic import write_json
from ml_embed.files.json_file import parse_json

ROUNDS = 3
"""Times that the texts of a language are encoded; the fastest counts."""
Encode = Callable[[Sequence[str]], Any]


@dataclass(frozen=True)
class Speeds:
    """A file of speeds."""

    path: Path
    made_of: str
    """digest of the models, the texts and the device; other speeds are measured anew"""

    def of(
        self, name: str, samples: Mapping[str, Sequence[str]], load: Callable[[], Encode]
    ) -> dict[str, float]:
        """Language -> texts per second of one model, on this process alone.

        Args:
            name: of the model in the file.
            samples: language -> texts.
            load: the model's encoding of texts.
        """
        kept = self._kept()
        if name not in kept:
            encode = load()
            kept[name] = {language: _speed(encode, texts) for language, texts in samples.items()}
            write_json(self.path, {"made_of": self.made_of, "speeds": kept})
        return kept[name]

    def _kept(self) -> dict[str, dict[str, float]]:
        try:
            content = parse_json(self.path.read_bytes())
            return content["speeds"] if content["made_of"] == self.made_of else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}


def _speed(encode: Encode, texts: Sequence[str]) -> float:
    encode(texts[:1])  # what the first call prepares is not counted
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        encode(texts)
        times.append(time.perf_counter() - start)
    return len(texts) / min(times)
