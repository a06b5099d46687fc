"""What a model folder says of itself: the sizes it was trained at (`ml_embed.json`)."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen3Config

from ml_embed.errors import UserError
from ml_embed.files.atomic import write_json
from ml_embed.model import NormSharing

FORMAT_VERSION = 1
RECORD_FILE = "ml_embed.json"
FACTORS_FILE = "embedding_factors.safetensors"
EXIT_NORMS_FILE = "exit_norms.safetensors"


@dataclass(frozen=True)
class ModelRecord:
    """What was trained."""

    exits: tuple[int, ...]
    """layers after which vectors were trained, ascending"""
    dims: tuple[int, ...]
    """vector lengths trained, largest first"""
    ranks: tuple[int, ...]
    """ranks of the token factors trained, ascending; empty for a whole table"""
    temperature: float
    max_seq_length: int
    """tokens, EOS included"""
    norm_sharing: NormSharing = "shared"
    pooling: str = "last_token"
    prompts: dict[str, str] = field(default_factory=dict)
    """prompt name -> text put before the input"""
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, folder: Path) -> "ModelRecord | None":
        """The record of a model folder; None for a plain backbone.

        Raises:
            UserError: the record is damaged or of a newer format.
        """
        path = folder / RECORD_FILE
        if not path.exists():
            return None
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("format_version")
            known = {f.name for f in dataclasses.fields(cls)}
            own: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
            }
            record = cls(**own)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); copy the model folder again") from None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {version}, this version reads {FORMAT_VERSION}; update "
                "ml-embed"
            )
        return record

    @classmethod
    def of_backbone(
        cls, folder: Path, config: Qwen3Config, tokenizer: PreTrainedTokenizerBase
    ) -> "ModelRecord":
        """A plain backbone counts as trained at its whole depth and length.

        Its prompts are those that sentence-transformers would use.

        Raises:
            UserError: the file of the prompts is damaged.
        """
        return cls(
            exits=(config.num_hidden_layers,),
            dims=(config.hidden_size,),
            ranks=(),
            temperature=1.0,  # not known; nothing reads it
            max_seq_length=int(min(tokenizer.model_max_length, config.max_position_embeddings)),
            prompts=_saved_prompts(folder / "config_sentence_transformers.json"),
        )

    def save(self, folder: Path) -> None:
        """Write it into a model folder."""
        write_json(folder / RECORD_FILE, dataclasses.asdict(self))


def _saved_prompts(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).get("prompts") or {})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the model folder again") from None
