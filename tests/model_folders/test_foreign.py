"""No code that a model folder names is run, and nothing outside of it is read, by any command."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.in_process import train
from helpers.scripts import load_script
from helpers.tiny_models import SPOKEN, make_tokenizer, write_model

import tokenize_data_qwen
from ml_embed import Embedder
from ml_embed.errors import UserError
from ml_embed.evaluation.cube import CubeModel
from ml_embed.inference.text_models import load_text_model

pytest.importorskip("sentence_transformers")
OURS = "sentence_transformers.models"
MEAN = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A path that exists after the test only if something was executed."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    path = tmp_path / "executed"
    code = f"from pathlib import Path\nPath({str(path)!r}).mkdir(exist_ok=True)\n"
    code += "from sentence_transformers.models import Pooling as Own\n"
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "trap_installed.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "installed")
    sys.modules.pop("trap_installed", None)
    importlib.import_module("trap_installed")
    path.rmdir()  # the trap works
    del sys.modules["trap_installed"]
    (tmp_path / "trap.py").write_text(code)
    yield path
    assert not path.exists(), "something was executed"


@pytest.fixture(scope="module")
def nested(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("foreign") / "model", make_tokenizer())


@pytest.fixture
def folder(nested, tmp_path, marker) -> Path:
    """A trained model folder with a trap in it, which nothing names yet."""
    copy = shutil.copytree(nested, tmp_path / "model")
    shutil.copy(tmp_path / "trap.py", copy)
    return copy


def modules(folder: Path, *listed: tuple[str, str, dict | None]) -> None:
    """modules.json of (type, path, config) after our Transformer."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": f"{OURS}.Transformer"}]
    for number, (kind, path, config) in enumerate(listed, start=1):
        entries.append({"idx": number, "name": str(number), "path": path, "type": kind})
        if config is not None:
            (folder / path).mkdir(exist_ok=True)
            (folder / path / "config.json").write_text(json.dumps(config))
    (folder / "modules.json").write_text(json.dumps(entries))


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def own_module(folder: Path) -> None:
    modules(folder, ("trap.Own", "1_Own", MEAN))


def own_module_named_as_ours(folder: Path) -> None:
    last = {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True}
    shutil.copy(folder / "trap.py", folder / "Pooling.py")
    modules(folder, ("Pooling.Pooling", "1_Pooling", last))


def installed_module(folder: Path) -> None:
    modules(folder, ("trap_installed.Own", "1_Own", MEAN))


def activation(folder: Path) -> None:
    dense = {"in_features": 64, "out_features": 64, "activation_function": "trap_installed.Own"}
    modules(folder, (f"{OURS}.Pooling", "1_Pooling", MEAN), (f"{OURS}.Dense", "2_Dense", dense))


def router(folder: Path) -> None:
    modules(folder, (f"{OURS}.Router", "1_Router", {}))
    types = {"query_0": "trap_installed.Own"}
    settings = {"types": types, "structure": {"query": ["query_0"]}, "parameters": {}}
    (folder / "1_Router" / "router_config.json").write_text(json.dumps(settings))


def words(folder: Path) -> None:
    modules(folder, (f"{OURS}.WordEmbeddings", "1_Words", {}))
    settings = {"tokenizer_class": "trap_installed.Own", "update_embeddings": False}
    (folder / "1_Words" / "wordembedding_config.json").write_text(json.dumps(settings))


def outside(folder: Path) -> None:
    shutil.copytree(folder / "1_Pooling", folder.parent / "1_Pooling")
    modules(folder, (f"{OURS}.Pooling", "../1_Pooling", None))


def absolute(folder: Path) -> None:
    place = shutil.copytree(folder / "1_Pooling", folder.parent / "1_Pooling")
    modules(folder, (f"{OURS}.Pooling", str(place), None))


def absolute_by_two_slashes(folder: Path) -> None:
    place = shutil.copytree(folder / "1_Pooling", folder.parent / "1_Pooling")
    modules(folder, (f"{OURS}.Pooling", f"/{place}", None))


def adapter_of_a_module(folder: Path) -> None:
    modules(folder, (f"{OURS}.Pooling", "1_Pooling", MEAN))
    adapter = {"base_model_name_or_path": str(folder.parent), "peft_type": "LORA"}
    (folder / "1_Pooling" / "adapter_config.json").write_text(json.dumps(adapter))


def kernel_of_the_hub(folder: Path) -> None:
    change(folder / "config.json", _attn_implementation="someone/attention")


def kernel_of_the_hub_in_arguments(folder: Path) -> None:
    modules(folder, (f"{OURS}.Pooling", "1_Pooling", MEAN))
    arguments = {"attn_implementation": "someone/attention"}
    change(folder / "sentence_bert_config.json", model_args=arguments)


def arguments_of_another_module(folder: Path) -> None:
    """sentence-transformers reads this file where the usual one is not there."""
    modules(folder, (f"{OURS}.Pooling", "1_Pooling", MEAN))
    (folder / "sentence_bert_config.json").unlink()
    settings = {"model_args": {"use_kernels": True}}
    (folder / "sentence_roberta_config.json").write_text(json.dumps(settings))


def adapter(folder: Path) -> None:
    modules(folder, (f"{OURS}.Pooling", "1_Pooling", MEAN))
    settings = {"base_model_name_or_path": "someone/base", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def asked_for_by_config(folder: Path) -> None:
    classes = dict.fromkeys(("AutoConfig", "AutoModel"), "trap.Own")
    change(folder / "config.json", auto_map=classes, model_type="trapped")
    modules(folder, (f"{OURS}.Pooling", "1_Pooling", MEAN))


def weights_outside(folder: Path) -> None:
    place = folder.parent / "model.safetensors"
    shutil.move(folder / "model.safetensors", place)
    index(folder, lambda name: "../model.safetensors")


def weights_at_an_absolute_path(folder: Path) -> None:
    place = folder.parent / "model.safetensors"
    shutil.move(folder / "model.safetensors", place)
    index(folder, lambda name: str(place))


def index(folder: Path, place: Callable[[str], str]) -> None:
    from safetensors import safe_open

    with safe_open(folder.parent / "model.safetensors", "pt") as file:
        places = {name: place(name) for name in file.keys()}  # noqa: SIM118
    content = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


# The last is transformers' own: a folder that is none of ours may have code, which it asks for.
REFUSALS = r"never run|not followed|a LoRA adapter|has the modules|has mean|contains custom code"
TRAPS = [
    own_module,
    own_module_named_as_ours,
    installed_module,
    activation,
    router,
    words,
    outside,
    absolute,
    absolute_by_two_slashes,
    adapter_of_a_module,
    kernel_of_the_hub,
    kernel_of_the_hub_in_arguments,
    arguments_of_another_module,
    adapter,
    asked_for_by_config,
    weights_outside,
    weights_at_an_absolute_path,
]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("trap", TRAPS)
def test_classes_that_read_models(folder, trap, trained):
    trap(folder)
    if not trained:
        shutil.rmtree(folder / "nested")
        (folder / "ml_embed.json").unlink()
    for read in (Embedder.from_pretrained, CubeModel.open, load_text_model):
        with pytest.raises(UserError, match=REFUSALS):
            read(folder)


COMMANDS = {
    "embed_teacher": (
        "--model MODEL --data TOKENIZED --tokenizer BACKBONE --output OUT --device cpu"
    ),
    "mine_hard_negatives": "--model MODEL --input RAW --output OUT --device cpu",
    "score_candidates": "--model MODEL --data RAW --output OUT --device cpu",
    "evaluate": "--model MODEL --data RAW --output OUT --device cpu",
    "evaluate_mteb": "--model MODEL --tasks STS12 --output OUT --device cpu",
    "encode": "--model MODEL --input RAW/facts.parquet --column query --output OUT.npy",
    "choose_cut": "--model MODEL --evaluation EVALUATED --device cpu",
    "export_model": "--model MODEL --output OUT",
    "prune_backbone": "--model MODEL --output OUT --layers 1 --texts RAW/facts.parquet",
    "compare_mel_init": "--model MODEL",
    "init_backbone": "--preset 160M --tokenizer MODEL --output OUT",
}


@pytest.mark.parametrize("trap", [own_module, asked_for_by_config, kernel_of_the_hub])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_read_models(folder, world, tmp_path, command, trap, capsys):
    trap(folder)
    if command == "init_backbone":
        change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.Own", None]})
    arguments, output = COMMANDS[command], tmp_path / "o"
    places = {"MODEL": folder, "TOKENIZED": world.tokenized, "RAW": world.raw, "OUT": output}
    places |= {"BACKBONE": world.backbone, "EVALUATED": tmp_path / "evaluation.json"}
    row = {"rank": 0, "depth": 1, "dim": 8, "parameters": 1, "bytes_per_vector": 32, "ndcg@10": 1}
    evaluated = {"model": {"model": "x", "rows": [row | {"chance": {"ndcg@10": 0}}]}}
    places["EVALUATED"].write_text(json.dumps(evaluated))
    for name, place in places.items():
        arguments = arguments.replace(name, str(place))
    assert load_script(command).main(arguments.split()) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize("trap", [own_module, asked_for_by_config, weights_outside])
def test_training_and_tokenizing(folder, world, tmp_path, trap, capsys):
    trap(folder)
    for key in ("model_path", "teacher_model_path"):
        assert train(world, tmp_path, **{key: str(folder)})[0] == 2
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["trap.Own", None]})
    arguments = ["--input", str(world.raw), "--output", str(tmp_path / "o")]
    assert tokenize_data_qwen.main([*arguments, "--tokenizer", str(folder)]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_what_sentence_transformers_may_load_is_loaded(folder):
    """Known modules with activations of torch, by the names of all of its versions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense

    modules(folder, (f"{OURS}.Pooling", "1_Pooling", MEAN))
    model = SentenceTransformer(str(folder), device="cpu")
    model.append(Dense(64, 16))
    model.save_pretrained(str(folder.parent / "other"))
    found = load_text_model(folder.parent / "other", "cpu").encode(SPOKEN, normalize=False)
    np.testing.assert_allclose(found, model.encode(SPOKEN), atol=2e-6)


def test_models_from_mappings_outside_by_links_are_read(folder):
    """Links are the user's own: a snapshot of the hub is made of them."""
    expected = Embedder.from_pretrained(folder, device="cpu").encode(SPOKEN)
    place = folder.parent / "blob"
    shutil.move(folder / "model.safetensors", place)
    (folder / "model.safetensors").symlink_to(place)
    found = Embedder.from_pretrained(folder, device="cpu").encode(SPOKEN)
    np.testing.assert_array_equal(found, expected)
