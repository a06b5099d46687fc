"""Writing the token table as a static model of model2vec: a text is the mean of its tokens.

No layer is run, and it was never trained to be that. Needs the extra `static`, which is imported
where it is used.

Letters: V vocabulary, D vector length.
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch

from ml_embed.errors import UserError
from ml_embed.files.atomic import atomic_folder, give_usual_permissions
from ml_embed.model_folders.card import Form, write_card
from ml_embed.model_folders.cut import Cut
from ml_embed.model_folders.export import Part
from ml_embed.model_folders.read import ModelFolder, map_table, read_factors

USE = """No layer is run, and it was not trained so: measure it before use.

```python
from model2vec import StaticModel

model = StaticModel.from_pretrained("FOLDER_OR_NAME")
vectors = model.encode(["a text", "another one"])
```

sentence-transformers reads it too."""

VECTORS = "the mean of a text's rows of the token table, cut to this length and normalised"


def export_static(part: Part, output: Path) -> dict[str, Any]:
    """Write a folder that model2vec and sentence-transformers read.

    Args:
        part: what to write, from `open_part`; its depth counts for nothing.
        output: the new folder, checked already; it appears whole or not at all.
    Returns:
        for the command's JSON line.
    Raises:
        UserError: the extra is missing, or the tokenizer leaves out ids.
    """
    if importlib.util.find_spec("model2vec") is None:
        raise UserError("model2vec is not installed; pip install 'ml-embed[static]'")
    from model2vec import StaticModel

    source, cut, record = part.folder, part.cut, part.record
    tokenizer = copy.deepcopy(source.tokenizer.backend_tokenizer)
    if max(tokenizer.get_vocab().values()) != tokenizer.get_vocab_size() - 1:
        raise UserError(f"the tokenizer of {source.path} leaves out ids, which model2vec cannot")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # The table may have more rows than the tokenizer has tokens, model2vec's may not.
    tokens = tokenizer.get_vocab_size()
    model = StaticModel(
        _rows(source, cut)[:tokens].numpy(),
        tokenizer,
        # The type is what tells a folder of ours from any other, see `check_model_output`.
        {"model_type": "model2vec", "normalize": True},
        normalize=True,
        max_length=None,  # model2vec guesses from characters where to cut
    )
    with atomic_folder(output) as new:
        model.save_pretrained(new)
        give_usual_permissions(new)
        form = Form("model2vec", USE, tokens * cut.dim, cut.dim, VECTORS, has_layers=False)
        write_card(new, record, form)
        size = sum(file.stat().st_size for file in new.glob("*.safetensors"))
    return {"bytes_of_weights": size}


def _rows(folder: ModelFolder, cut: Cut) -> torch.Tensor:
    """(V, D) leading components of the token table."""
    if folder.record.ranks:
        A, B = read_factors(folder.path, cut.rank)
        return A @ B[:, : cut.dim]
    return map_table(folder.path, folder.config)[:, : cut.dim].float().contiguous()
