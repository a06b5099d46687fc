"""Writing a cut model for onnxruntime, FastEmbed and transformers.js."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder, write_json
from ml_embed.forms.loss import SMALLEST_COSINE, Loss, measure_loss, texts_by_language
from ml_embed.forms.onnx_graph import graph_of, require_onnx, save_graph
from ml_embed.forms.onnx_session import OnnxModel
from ml_embed.inference.embedder import Embedder
from ml_embed.model_folders.card import Form, write_card
from ml_embed.model_folders.export import Part
from ml_embed.model_folders.read import load_for_transformers
from ml_embed.model_folders.sizes import parameters_of
from ml_embed.model_folders.write import save_settings
from ml_embed.prepare.tokenizer import TextTokenizer, end_token

WHOLE, INT8 = "onnx/model.onnx", "onnx/model_int8.onnx"
"""Where transformers.js looks for a graph, and for one in 8 bits (`dtype: "int8"`)."""
USE = """The graph takes `input_ids` and `attention_mask`, both int64 (texts, tokens), padded on
either side, and gives `sentence_embedding`, float32 (texts, {length}): pooled, cut and normalised.

```python
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_NAME")  # appends the end token by itself
session = onnxruntime.InferenceSession("FOLDER_OR_NAME/{file}")
batch = tokenizer(["a text", "another one"], padding=True, truncation=True, return_tensors="np")
inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
vectors = session.run(["sentence_embedding"], inputs)[0]
```"""


@dataclass(frozen=True)
class Int8:
    """That weights are held in 8 bits, and on which texts the loss is measured."""

    texts: Path | None = None
    """raw data; None is the embedded corpus"""
    allow_loss: bool = False
    """write the model however much it loses"""


def export_onnx(part: Part, output: Path, int8: Int8 | None = None) -> dict[str, Any]:
    """Write a folder with the graph, the tokenizer, the config and a card.

    Args:
        part: what to write, from `open_part`.
        output: the new folder, checked already; it appears whole or not at all.
        int8: None holds weights in float32.
    Returns:
        for the command's JSON line; with `int8` the loss too, see `Loss.to_json`.
    Raises:
        UserError: the extra is missing, or a text loses more than `int8` allows.
    """
    require_onnx()
    texts = texts_by_language(int8.texts) if int8 else {}
    source, cut, record = part.folder, part.cut, part.record
    backbone = load_for_transformers(source, cut.depth, cut.rank)
    config, file = backbone.config, INT8 if int8 else WHOLE
    graph = graph_of(backbone, cut.dim, end_token(source.tokenizer), int8=int8 is not None)
    del backbone
    with atomic_folder(output) as new:
        save_graph(graph, new / file)
        save_settings(new, config, source.tokenizer, record, torch.float32)
        _write_special_tokens(new, source.tokenizer)
        report: dict[str, Any] = {"file": file}
        use = USE.replace("{file}", file).replace("{length}", str(cut.dim))
        if int8:
            loss = _loss(part, OnnxModel(new / file, _tokenizer(part)), texts)
            if loss.smallest < SMALLEST_COSINE and not int8.allow_loss:
                raise UserError(loss.refusal())
            write_json(new / "int8.json", loss.to_json())
            use += "\n\n" + loss.sentence()
            report |= loss.to_json()
        parameters = parameters_of(config, cut)
        write_card(new, record, Form("onnx", use, parameters, cut.dim))
        report["bytes_of_weights"] = sum(f.stat().st_size for f in (new / "onnx").iterdir())
    return report


def _tokenizer(part: Part) -> TextTokenizer:
    return TextTokenizer(part.folder.tokenizer, part.record.max_seq_length)


def _loss(part: Part, model: OnnxModel, texts: dict[str, list[str]]) -> Loss:
    sizes = vars(part.cut) | {"rank": part.cut.rank or None}
    whole = Embedder.from_pretrained(
        part.folder.path, **sizes, allow_untrained=True, device="cpu", dtype=torch.float32
    )
    return measure_loss(model.encode, lambda texts: whole.encode(texts, prompt=""), texts)


def _write_special_tokens(folder: Path, tokenizer: Any) -> None:
    """What FastEmbed asks for; transformers 5 keeps it in tokenizer_config.json alone."""
    names = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    write_json(folder / "special_tokens_map.json", names)
