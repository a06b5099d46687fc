"""The model card (`README.md`) of a model folder: what the hub, and whoever opens it, is told."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import Qwen3Config

from ml_embed.errors import UserError
from ml_embed.files.model_source import hub_name, is_released
from ml_embed.model_folders.cut import whole_cut
from ml_embed.model_folders.foreign import MODULES_FILE
from ml_embed.model_folders.record import RECORD_FILE, ModelRecord, Origin, TrainedOn
from ml_embed.model_folders.sizes import parameters_of

CARD_FILE = "README.md"
LIBRARY = "sentence-transformers"
OWN_LIBRARIES = (LIBRARY, "ml-embed")
"""Those that take a prompt by its name."""
TASK = "sentence-similarity"
_LANGUAGE_CODE = re.compile(r"[A-Za-z]{2,3}(?![A-Za-z])")
"""The hub knows languages (ISO 639), not their countries or scripts: pt of pt_BR."""
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TAGS = [TASK, "feature-extraction", "ml-embed", "matryoshka"]

BODY = """# {title}

A {kind} text-embedding model made with ML-Embed, {parameters:,} parameters{base}. It gives
vectors of {length} components: {vectors}.

## Sizes trained

| axis | trained |
|---|---|
| vector length | {dims} |
{exits}| rank of the token table | {ranks} |

{read}

{data}
## Use

{use}

The first components of a vector are a vector too: **normalise again after truncating**.{truncate}

## Prompts

{prompts}
"""

CUTS = """Every size above can be cut without training, with ML-Embed:

```python
from ml_embed import Embedder

model = Embedder.from_pretrained("FOLDER_OR_NAME", dim={dim}, depth={depth}{rank})
vectors = model.encode(["a text", "another one"])
```"""
USE = f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER_OR_NAME")
vectors = model.encode(["a text", "another one"])
```

{CUTS}"""
USE_OF_FACTORS = f"""This folder holds the factors of the token table and not the table itself.
So **only ML-Embed reads it**:

```python
from ml_embed.sentence_transformers import load

model = load("FOLDER_OR_NAME")  # a SentenceTransformer
vectors = model.encode(["a text", "another one"])
```

For other programs, `scripts/export_model.py --model FOLDER_OR_NAME --output NEW_FOLDER` writes a
folder with the table.

{CUTS}"""
TRUNCATE = """
`truncate_dim` of sentence-transformers cuts after the normalisation, so give
`normalize_embeddings=True` with it."""


@dataclass(frozen=True)
class Form:
    """What a card says of the form that a model is written in."""

    library: str
    """the hub's name of the program that reads it"""
    use: str
    """how it is used"""
    parameters: int
    length: int
    """components of the vectors that the program gives"""
    vectors: str = "the last token's hidden state, cut to this length and normalised"
    """what they are"""
    has_layers: bool = True
    """False is the token table alone, which reads texts of any length"""


def own_form(config: Qwen3Config, record: ModelRecord, with_table: bool) -> Form:
    """A model folder, with the token table or without."""
    use = (USE if with_table else USE_OF_FACTORS).format(
        dim=min(record.dims),
        depth=min(record.exits),
        rank=f", rank={min(record.ranks)}" if record.ranks else "",
    )
    parameters = parameters_of(config, whole_cut(record, config))
    return Form(LIBRARY if with_table else "ml-embed", use, parameters, record.dims[0])


def write_card(folder: Path, record: ModelRecord, form: Form) -> None:
    """Write the model card of a folder that holds a model in a form."""
    origin = record.origin
    data = ModelCardData(
        base_model=origin.base_model,
        datasets=_on_the_hub(origin) or None,
        language=list(origin.languages) or None,
        library_name=form.library,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        pipeline_tag=TASK,
        tags=list(dict.fromkeys([form.library, *TAGS])),
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(record, form)}"
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _body(record: ModelRecord, form: Form) -> str:
    origin, ranks = record.origin, record.ranks
    return BODY.format(
        use=form.use,
        truncate=TRUNCATE if form.library == LIBRARY else "",
        kind="nested" if form.has_layers else "static",
        title=(origin.base_model or "Text embeddings").split("/")[-1],
        base=f", trained from {origin.base_model}" if origin.base_model else "",
        parameters=form.parameters,
        length=form.length,
        vectors=form.vectors,
        dims=_listed(record.dims),
        exits=f"| layers | {_listed(record.exits)} |\n" if form.has_layers else "",
        ranks=_listed(ranks) if ranks else "none: the table is whole",
        read=f"Texts are read up to {record.max_seq_length} tokens."
        if form.has_layers
        else "Texts are read whole.",
        data=_training_data(origin),
        prompts=_prompts(record, form.library),
    )


def _on_the_hub(origin: Origin) -> list[str]:
    """The datasets that the hub has, by their names there."""
    names = [item.source or item.dataset for item in origin.trained_on]
    return list(dict.fromkeys(name for name in names if _HUB_NAME.fullmatch(name)))


def _training_data(origin: Origin) -> str:
    """A section of the datasets trained on; nothing where none is known."""
    if not origin.trained_on:
        return ""
    columns = ("dataset", "source", "revision", "license", "rows")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---:|"]
    for item in origin.trained_on:
        cells = [getattr(item, name) for name in columns]
        cells = [f"{cell:,}" if isinstance(cell, int) else cell or "not known" for cell in cells]
        cells = [" ".join(cell.split()).replace("|", "&#124;") for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    if not origin.all_data_known:
        lines += ["", "What was trained on before these datasets is not known."]
    return "\n".join(["## Training data", "", *lines, "", ""])


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(sizes)))


def _prompts(record: ModelRecord, library: str) -> str:
    if not any(record.prompts.values()):
        return "None: texts are encoded as they are."
    lines = [f"- `{name}`: `{text!r}`" for name, text in record.prompts.items() if text]
    if library not in OWN_LIBRARIES:
        return "\n".join([*lines, "", "Put one in front of each text yourself."])
    default = record.default_prompt_name
    unnamed = f"`{default}` is put before texts" if default else "no prompt is put before texts"
    return "\n".join([*lines, "", f"Choose one with `prompt_name`; without it {unnamed}."])


def origin_of(
    folder: Path, record: ModelRecord, datasets: Iterable[TrainedOn], languages: Iterable[str]
) -> Origin:
    """What is known of what is trained.

    Args:
        folder: of the model that training starts from.
        record: of that model.
        datasets: that are trained on.
        languages: of their rows, as the data writes them.
    """
    known = record.origin
    if known == Origin():
        known = Origin.of_backbone(folder) or _origin_of_folder(folder)
    codes = (_LANGUAGE_CODE.match(language) for language in languages)
    spoken = sorted({code[0].lower() for code in codes if code})
    return replace(
        known,
        trained_on=tuple(dict.fromkeys((*known.trained_on, *datasets))),
        languages=tuple(dict.fromkeys((*known.languages, *spoken))),
    )


def _origin_of_folder(folder: Path) -> Origin:
    """Of a model from elsewhere: what its place and its own card say."""
    try:
        data = ModelCard.load(folder / CARD_FILE).data if (folder / CARD_FILE).is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / CARD_FILE} is no model card ({error}); correct or remove it"
        ) from None
    given = getattr(data, "language", None)
    # YAML reads no, which is Norwegian, as false.
    languages = ["no" if code is False else str(code) for code in _as_list(given)]
    license, name = getattr(data, "license", None), getattr(data, "license_name", None)
    if isinstance(license, list):  # the hub takes one
        license, name = "other", ", ".join(license)
    # A folder that says no vectors is a language model.
    embeds = any((folder / file).is_file() for file in (RECORD_FILE, MODULES_FILE))
    return Origin(
        base_model=hub_name(folder),
        license=license,
        license_name=name,
        license_link=getattr(data, "license_link", None),
        languages=tuple(languages),
        all_data_known=not (embeds or is_released(folder)),
    )


def _as_list(given: Any) -> list[Any]:
    """What a card says once or as a list."""
    if given is None:
        return []
    return given if isinstance(given, list) else [given]
