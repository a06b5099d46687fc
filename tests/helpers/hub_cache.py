"""A cache of the Hugging Face hub, as its client and `datasets` leave one."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, DatasetInfo, Version
from datasets.arrow_writer import ArrowWriter
from datasets.naming import camelcase_to_snakecase
from datasets.splits import SplitDict, SplitInfo

REVISION = "0123456789abcdef0123456789abcdef01234567"


def environment(home: Path) -> dict[str, str]:
    """With this, a process finds what lies in a cache and asks nobody."""
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def put_model(home: Path, name: str, folder: Path) -> None:
    """A model folder under the name owner/model."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / REVISION)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(REVISION)


def put_dataset(home: Path, name: str, config: str, split: str, columns: Mapping) -> None:
    """One split of one configuration of the dataset owner/name, prepared as Arrow."""
    data, (owner, own) = Dataset.from_dict(dict(columns)), name.split("/")
    own = camelcase_to_snakecase(own)
    folder = home / "datasets" / f"{owner}___{own}" / config / "0.0.0" / REVISION
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / f"{own}-{split}.arrow"), features=data.features) as writer:
        writer.write_table(data.data.table)
        writer.finalize()
    DatasetInfo(
        features=data.features,
        config_name=config,
        dataset_name=own,
        version=Version("0.0.0"),
        splits=SplitDict({split: SplitInfo(split, num_examples=len(data), dataset_name=own)}),
    ).write_to_directory(str(folder))
