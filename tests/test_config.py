"""Reading, overriding and refusing configs; what a user sees of a mistake on the command line."""

import ast
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
from helpers import ROOT

import ml_embed
import run as run_script
from ml_embed.config import DatasetConfig, TrainConfig, field_docs, load_config, parse_config
from ml_embed.errors import UserError

REQUIRED = dict.fromkeys(
    ("model_path", "experiment_id", "output_dir", "tb_dir", "cache_dir", "train_data_path"), "x"
)

# The keys that users' configs have, with the defaults they rely on.
PROMISED_DEFAULTS = {
    "train_batch_size": 8, "max_seq_length": 2048, "learning_rate": 1e-4, "min_lr": 1e-6,
    "weight_decay": 1e-2, "warmup_steps": 100, "use_mrl": False, "use_mll": False, "r": 0,
    "use_mel": False, "teacher_model_path": None, "kd_weight": 1.0, "scheduler_type": "cosine",
    "num_hard_neg": 7, "num_hard_neg_clustering": 9, "train_steps": -1, "train_epochs": 5,
    "log_interval": 20, "checkpointing_steps": 100, "validation_steps": 100, "num_processes": 0,
    "seed": 0, "temperature": 0.05, "valid_fraction": 0.01, "max_grad_norm": 1.0,
    "attention": "auto", "max_tokens_per_forward": 0, "mll_layers": None, "mrl_dims": None,
    "mel_ranks": None, "mel_init": "svd", "mll_norm": "shared", "mask_false_negatives": True,
    "report_to": ("tensorboard",),
}  # fmt: skip


def test_defaults_are_the_promised_ones():
    config = parse_config(REQUIRED)
    assert {key: getattr(config, key) for key in PROMISED_DEFAULTS} == PROMISED_DEFAULTS


def test_every_key_is_accepted_and_documented():
    config = parse_config(REQUIRED)
    values = {key: value for key, value in vars(config).items() if key != "datasets"}
    assert vars(parse_config(values)) == vars(config)
    assert set(field_docs(TrainConfig)) == set(vars(config))
    assert set(field_docs(DatasetConfig)) == set(vars(DatasetConfig()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1}, "lerning_rate: unknown key; did you mean 'learning_rate'"),
        ({"train_batch_size": "8"}, "train_batch_size: '8' must be a whole number, not a string"),
        ({"train_batch_size": 0}, "train_batch_size: 0 must be at least 1"),
        ({"use_mrl": 1}, "use_mrl: 1 must be a true/false value"),
        ({"r": True}, "r: True must be a whole number"),
        ({"learning_rate": -1}, "learning_rate: -1.0 must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate: must be a finite number"),
        ({"scheduler_type": "linear"},
         "scheduler_type: 'linear' is not one of 'cosine', 'constant_with_warmup'"),
        ({"use_mel": True}, "use_mel: true needs factors"),
        ({"mel_sampling": "full"}, "mel_sampling: 'full' needs use_mel"),
        ({"mel_refactor": "save"}, "mel_refactor: 'save' needs factors"),
        ({"mel_refactor": 100}, "mel_refactor: 100 needs factors"),
        ({"mel_refactor": 0, "r": 8}, "mel_refactor: 0 must be at least 1"),
        ({"mel_refactor": 9, "r": 8, "optimizer": "adamw_8bit"},
         "moments in 8 bits cannot be turned"),
        ({"embedding_lr_scale": "large"},
         "embedding_lr_scale: 'large' is not one of 'auto' or a number"),
        ({"embedding_lr_scale": 0}, "embedding_lr_scale: 0.0 must be greater than 0"),
        ({"mel_refactor": "often", "r": 8},
         "mel_refactor: 'often' is not one of 'never', 'save' or a whole number"),
        ({"mrl_weights": "uniform"}, "mrl_weights is given but use_mrl is false"),
        ({"mll_weights": [1, 2]}, "mll_weights is given but use_mll is false"),
        ({"mrl_weights": [0, 0], "use_mrl": True}, "mrl_weights: the sum of [0.0, 0.0] must be"),
        ({"mll_weights": [1e308, 1e308], "use_mll": True}, "must be more than 0, and finite"),
        ({"mll_prior_weight": 3, "use_mll": True}, "mll_prior_weight needs mll_weights 'last'"),
        ({"mll_weights": [1, 0], "use_mll": True, "teacher_vectors_path": "x"},
         "mll_weights: the last layer's exit learns from the teacher"),
        ({"mll_weights": [1, "2"], "use_mll": True}, "mll_weights[1]: '2' must be a number"),
        ({"mll_weights": "first", "use_mll": True},
         "mll_weights: 'first' is not one of 'uniform', 'last', 'linear' or a list of numbers"),
        ({"mrl_dims": [8]}, "mrl_dims is given but use_mrl is false"),
        ({"mrl_dims": [], "use_mrl": True},
         "mrl_dims: the list is empty; name at least one whole number"),
        ({"mrl_dims": 8, "use_mrl": True}, "mrl_dims: 8 must be a list of whole numbers"),
        ({"use_mrl": True, "mrl_dims": [8, 8]}, "holds a value twice"),
        ({"datasets": {"a": {"task": "ranking"}}}, "datasets.a.task: 'ranking' is not one of"),
        ({"datasets": {"a": {"weight": 1e300}}}, "datasets.a.weight: 1e+300 must be at most 1000"),
        ({"datasets": {"a": 1}}, "datasets.a: must be an object"),
        ({"datasets": {"a": {"wight": 1}}}, "datasets.a.wight: unknown key; did you mean 'weight'"),
        ({"experiment_id": "../x"}, "experiment_id"),
        ({"train_steps": 0}, "train_steps: 0 trains nothing"),
        ({"min_lr": 1}, "min_lr 1.0 is larger than learning_rate"),
        ({"model_path": None}, "model_path: None must be a string, not null"),
        ({"valid_fraction": 0.9}, "valid_fraction: 0.9 must be at most 0.5"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_config(REQUIRED | changes)


def test_a_list_of_other_things_is_one_problem_an_item():
    with pytest.raises(UserError) as caught:
        parse_config(REQUIRED | {"use_mrl": True, "mrl_dims": ["a", "b"]})
    first, *rest = str(caught.value).splitlines()
    assert first == "config has 2 problems:"
    assert [line.split(": ")[0] for line in rest] == ["  - mrl_dims[0]", "  - mrl_dims[1]"]


def test_home_is_expanded_in_every_path_and_the_users_own_words_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = [key for key in vars(parse_config(REQUIRED)) if key.endswith(("_path", "_dir"))]
    assert len(keys) == 8
    for given in (dict.fromkeys(keys, "~/x"), dict.fromkeys(keys, "./x")):
        (tmp_path / "config.json").write_text(
            json.dumps(REQUIRED | given | {"teacher_vectors_path": None})
        )
        config, saved = load_config("~/config.json")
        expected = {given["model_path"].replace("~", str(tmp_path))}
        assert {getattr(config, key) for key in keys if key != "teacher_vectors_path"} == expected
        assert saved["output_dir"] == given["output_dir"]
    vectors = parse_config(REQUIRED | {"teacher_vectors_path": "~/x"}).teacher_vectors_path
    assert vectors == str(tmp_path / "x")


@pytest.mark.parametrize("key", ["output_dir", "tb_dir", "cache_dir"])
def test_a_file_where_a_folder_is_to_be_written(tmp_path, key):
    (tmp_path / "file").write_text("precious")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(
            UserError, match=re.escape(f"{key}: {tmp_path / 'file'} is a file; name a folder")
        ):
            parse_config(REQUIRED | {key: str(place)})


def test_all_problems_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        parse_config({"r": -1, "seed": "a", "nonsense": 0})
    text = str(caught.value)
    assert "9 problems" in text
    assert all(key in text for key in ("r:", "seed:", "nonsense:", "model_path", "train_data_path"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON: line 1"),
        ("[]", "must hold one JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"datasets": ' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
        ('{"seed": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"experiment_id": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "missing.json")


def test_overrides_are_json_or_else_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(REQUIRED))
    config, given = load_config(
        path, ["train_batch_size=32", "experiment_id=abc", "mrl_dims=[8,16]", "use_mrl=true"]
    )
    assert (config.train_batch_size, config.experiment_id, config.mrl_dims) == (32, "abc", (8, 16))
    assert given["train_batch_size"] == 32
    with pytest.raises(UserError, match="seed: '999"):
        load_config(path, ["seed=" + "9" * 5000])
    with pytest.raises(UserError, match="key=value"):
        load_config(path, ["train_batch_size"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.json")), ids=lambda path: path.name
)
def test_every_shipped_config_loads(path):
    config, _ = load_config(path)
    assert config.mel_init == "frequency"


def test_the_best_config_is_the_common_one_but_for_what_was_measured():
    common, best = (
        load_config(ROOT / "configs" / f"{name}.json")[1] for name in ("config", "config_best")
    )
    measured = {
        **{"mel_sampling": "full", "mel_refactor": "save", "embedding_lr_scale": 128},
        "in_batch_pairs": "all",
    }
    own = {"experiment_id": best["experiment_id"]}
    assert best == common | measured | own


def test_what_the_configs_and_the_pages_commands_make_is_ignored_by_git():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    pages = "".join(
        (ROOT / folder / "README.md").read_text(encoding="utf-8")
        for folder in (".", "configs", "scripts", "tests", "ml_embed/sample_data")
    )
    made = re.findall(r"^python .*--(?:output|out|eval-output) (\S+)", pages, flags=re.MULTILINE)
    for path in (ROOT / "configs").rglob("*.json"):
        config, _ = load_config(path)
        made += [
            getattr(config, key)
            for key in ("model_path", "train_data_path", "output_dir", "tb_dir", "cache_dir")
        ]
    assert len(made) > 20
    assert {f"/{Path(place).parts[0]}/" for place in made} <= set(ignored)


def test_importing_does_nothing_and_every_module_imports():
    for module in pkgutil.walk_packages(ml_embed.__path__, "ml_embed."):
        importlib.import_module(module.name)
        tree = ast.parse(Path(importlib.util.find_spec(module.name).origin).read_text())
        calls = [
            node
            for node in tree.body
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ]
        assert not calls, f"{module.name} calls something when imported"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_path": "/nowhere/model"}, "/nowhere/model"),
        ({"train_data_path": "/nowhere/data"}, "/nowhere/data"),
        ({"r": 65, "mel_ranks": None}, "r: 65 is more than"),
        ({"mll_layers": [9]}, "mll_layers: 9 is deeper than the backbone's 2 layers"),
        ({"mrl_dims": [128]}, "mrl_dims: 128 is longer"),
        ({"max_seq_length": 100_000}, "max_seq_length: 100000 is longer"),
        ({"datasets": {"fakts": {}}}, "'fakts' matches none of the datasets"),
        ({"report_to": ["tensorbored"]}, "report_to: tensorbored"),
        ({"teacher_model_path": "/nowhere/teacher"}, "/nowhere/teacher"),
        ({"attention": "flash"}, "attention: 'flash' cannot run"),
    ],
)
def test_a_user_sees_a_message_and_nothing_is_written(world, tmp_path, capsys, changes, message):
    path = world.write_config(
        tmp_path / "config.json", output_dir=str(tmp_path / "runs"), **changes
    )
    assert run_script.main(["--config", str(path)]) == 2
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith(("error:", "  -"))
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "runs").exists()


def test_another_tokenizer_than_the_datas_is_refused(world, tmp_path, capsys):
    from transformers import AutoModel

    from ml_embed.prepare.tokenizer_training import train_tokenizer

    AutoModel.from_pretrained(world.backbone).save_pretrained(tmp_path / "other")
    train_tokenizer(["entirely other words for another vocabulary"] * 3, 300).save_pretrained(
        tmp_path / "other"
    )
    path = world.write_config(
        tmp_path / "c.json", model_path=str(tmp_path / "other"), output_dir=str(tmp_path)
    )
    assert run_script.main(["--config", str(path)]) == 2
    assert "tokenized with another tokenizer" in capsys.readouterr().err
