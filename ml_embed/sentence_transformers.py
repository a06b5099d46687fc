"""A model folder as a SentenceTransformer that holds the token factors, never the whole table.

    from ml_embed.sentence_transformers import load

    model = load("my_models/model", depth=8, rank=128, dim=256)

It encodes and trains like any other, and saves a model folder of this project with `nested/`.

Letters: B texts of a batch, S their longest length, V vocabulary, r rank, H hidden size, D vector
length.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Model

from ml_embed.errors import UserError
from ml_embed.files.model_source import find_model_folder
from ml_embed.files.paths import home_path
from ml_embed.model_folders.cut import choose_cut
from ml_embed.model_folders.export import cut_record
from ml_embed.model_folders.read import (
    ModelFolder,
    load_for_transformers,
    nearest_norm,
    read_exit_norms,
)
from ml_embed.model_folders.record import NESTED, RECORD_FILE, TABLE
from ml_embed.model_folders.write import save_model_folder
from ml_embed.prepare.tokenizer import append_eos_template

try:
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.sentence_transformer.modules import (
            InputModule,
            Module,
            Normalize,
            Pooling,
        )
    except ImportError:  # before version 6
        from sentence_transformers.models import InputModule, Module, Normalize, Pooling
except ImportError as error:
    raise UserError(
        f"sentence-transformers cannot be imported ({error}); pip install "
        "'ml-embed[sentence-transformers]'"
    ) from error


def load(
    folder: str | Path,
    depth: int | None = None,
    rank: int | None = None,
    dim: int | None = None,
    device: str | None = None,
    allow_untrained: bool = False,
    dtype: torch.dtype = torch.float32,
) -> "NestedSentenceTransformer":
    """Load a model folder, cut, as a SentenceTransformer; its vectors are the Embedder's.

    Args:
        folder: what training or `scripts/export_model.py` wrote, with or without its token table;
            a plain Qwen3 backbone; or a name on the hub.
        depth, rank, dim: None is the whole of an axis.
        device: as in SentenceTransformer.
        allow_untrained: take values that were not trained.
        dtype: of weights and computation.
    Raises:
        UserError: as in `Embedder.from_pretrained`.
    """
    cut = {"depth": depth, "rank": rank, "dim": dim}
    return NestedSentenceTransformer(
        folder, **cut, device=device, allow_untrained=allow_untrained, dtype=dtype
    )


class NestedSentenceTransformer(SentenceTransformer):
    """A SentenceTransformer that is read from a model folder, cut, and saved as one."""

    def __init__(
        self,
        folder: str | Path,
        depth: int | None = None,
        rank: int | None = None,
        dim: int | None = None,
        allow_untrained: bool = False,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ):
        """What `load` does; sentence-transformers' trainer reads its checkpoints by this, too."""
        source = ModelFolder.open(find_model_folder(folder))
        cut = choose_cut(source.record, source.config, depth, dim, rank, allow_untrained)
        backbone = load_for_transformers(source, cut.depth, cut.rank, dtype)
        self._record = cut_record(source.record, cut)
        self._shallow_norms: dict[int, Tensor] = {}
        if self._record.norm_sharing == "per_layer":
            norms = read_exit_norms(source.path, dtype)
            self._shallow_norms = {n: nearest_norm(norms, n) for n in self._record.exits[:-1]}
        tokenizer = copy.deepcopy(source.tokenizer)
        append_eos_template(tokenizer)  # a plain backbone's appends none by itself
        transformer = NestedTransformer(backbone, tokenizer, self._record.max_seq_length)
        pooling = Pooling(backbone.config.hidden_size, pooling_mode="lasttoken")
        super().__init__(
            modules=[transformer, pooling, CutVectors(cut.dim), Normalize()],
            prompts=dict(self._record.prompts),
            default_prompt_name=self._record.default_prompt_name,
            similarity_fn_name="cosine",
            **options,
        )

    def save(self, path: str, *args: Any, safe_serialization: bool = True, **options: Any) -> None:
        """Write a model folder with the token table and `nested/`; other files there stay.

        It lists the sizes that the model had, though only those go on learning that the loss is
        computed at: the whole, and others with MatryoshkaLoss.

        Raises:
            UserError: adapters are not merged, a weight is not finite, or a pickle is asked for.
        """
        if not safe_serialization:
            raise UserError("weights are written as safetensors only; leave safe_serialization out")
        output = home_path(path)
        output.mkdir(parents=True, exist_ok=True)
        record = dataclasses.replace(
            self._record,
            prompts=dict(self.prompts),
            default_prompt_name=self.default_prompt_name,
            max_seq_length=self.max_seq_length,
        )
        config, tokenizer = self[0].auto_model.config, self[0].tokenizer
        with tempfile.TemporaryDirectory(dir=output, prefix=".saving-") as aside:
            new = Path(aside)
            save_model_folder(new, self._encoder_state(), config, tokenizer, record)
            _move_over(new, output)

    def _encoder_state(self) -> dict[str, Tensor]:
        """The weights by the names that `MatryoshkaEncoder` has for them."""
        backbone = self[0].auto_model
        state = {name: tensor.detach().cpu() for name, tensor in backbone.state_dict().items()}
        table = {name: state.pop(name) for name in list(state) if name.startswith("embed_tokens.")}
        with torch.device("meta"):
            known = Qwen3Model(backbone.config).state_dict().keys()
        if other := sorted(state.keys() ^ known - {TABLE}):
            raise UserError(
                f"the model has other weights than a Qwen3 model's, e.g. {other[0]}; merge "
                "adapters before it is saved"
            )
        norms = [*self._shallow_norms.values(), state.pop("norm.weight")]
        return (
            {f"backbone.{name}": tensor for name, tensor in state.items()}
            | {name.replace("embed_tokens", "embedding"): t for name, t in table.items()}
            | {f"norms.{place}.weight": norm.cpu() for place, norm in enumerate(norms)}
        )


def _move_over(new: Path, output: Path) -> None:
    """Let the files of a model folder take the place of those in another; weights of that go."""
    files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    for old in (*output.glob("*.safetensors*"), *output.glob(f"{NESTED}/*")):
        old.unlink()
    # the record first: its digests tell of a folder that was left half moved
    for file in sorted(files, key=lambda file: file.name != RECORD_FILE):
        (output / file).parent.mkdir(exist_ok=True)
        (new / file).replace(output / file)


class NestedTransformer(InputModule):
    """The first module: texts to hidden states, with the factors in place of the token table."""

    def __init__(
        self, backbone: Qwen3Model, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
    ):
        super().__init__()
        self.auto_model = backbone
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """(B, S) `input_ids` and `attention_mask` of texts behind a prompt."""
        texts = [(prompt or "") + text for text in inputs]
        cut = {"truncation": True, "max_length": self.max_seq_length}
        return dict(self.tokenizer(texts, padding=True, return_tensors="pt", **cut))

    def tokenize(self, texts: Sequence[str], **kwargs: Any) -> dict[str, Tensor]:
        """`preprocess` by the name that sentence-transformers 5 calls."""
        return self.preprocess(texts, **kwargs)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `token_embeddings`, (B, S, H), after the final norm."""
        output = self.auto_model(
            input_ids=features["input_ids"],
            attention_mask=features["attention_mask"],
            use_cache=False,
        )
        features["token_embeddings"] = output.last_hidden_state
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("NestedSentenceTransformer.save writes all modules at once")


class CutVectors(Module):
    """The leading D components of the pooled vectors, which Normalize comes after."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """(B, H) -> (B, D) `sentence_embedding`."""
        features["sentence_embedding"] = features["sentence_embedding"][:, : self.dim]
        return features

    def get_sentence_embedding_dimension(self) -> int:
        return self.dim

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("NestedSentenceTransformer.save writes all modules at once")
