"""A small random model for rehearsals of what takes real ones long."""

from pathlib import Path

from ml_embed.model_folders.backbone import init_backbone
from ml_embed.model_folders.importing import import_model
from ml_embed.model_folders.record import RECORD_FILE
from ml_embed.prepare.tokenizer_training import read_texts, train_tokenizer

VOCABULARY, RANK = 2000, 32


def make_mock_model(folder: Path, texts: Path) -> None:
    """Write a model folder with token factors of rank 32 and random weights; once.

    Args:
        folder: the new model.
        texts: files that its tokenizer is trained on.
    """
    if (folder / RECORD_FILE).is_file():
        return
    backbone = folder.with_name(f"{folder.name}_start")
    files = sorted(texts.rglob("*.jsonl"))
    init_backbone("tiny", train_tokenizer(read_texts(files), VOCABULARY), backbone, overwrite=True)
    import_model(backbone, folder, RANK, overwrite=True)
