"""What a folder says is obeyed, or refused by name: alike wherever models are read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.in_process import train
from helpers.tiny_models import (
    SPOKEN,
    TEXTS,
    assert_equal_vectors,
    make_tokenizer,
    random_backbone,
    reseal,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ml_embed import Embedder
from ml_embed.errors import UserError
from ml_embed.evaluation.cube import CubeModel, evaluate_cube
from ml_embed.inference.text_models import OwnModel, SentenceTransformersModel, load_text_model
from ml_embed.model_folders.export import export_model
from ml_embed.model_folders.read import load_backbone_config, map_table
from ml_embed.model_folders.seal import stale, verify_model
from ml_embed.prepare.tokenizer import append_eos_template

LASTTOKEN = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
"""Both, because sentence-transformers 5.2 takes the mean too where nothing is said of it."""
KINDS = {
    "Transformer": "sentence_transformers.models.Transformer",
    "Pooling": "sentence_transformers.models.Pooling",
    "Dense": "sentence_transformers.models.Dense",
    "Normalize": "sentence_transformers.models.Normalize",
    "LayerNorm": "sentence_transformers.models.LayerNorm",
    "Own": "modeling_own.OwnPooling",
}


@pytest.fixture
def backbone(tmp_path) -> Path:
    """A plain backbone that may be changed."""
    tokenizer = make_tokenizer()
    random_backbone(tokenizer).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def change(path: Path, **settings) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def write_modules(folder: Path, *kinds: str, pooling: dict = LASTTOKEN) -> None:
    """modules.json and what belongs to it, written by hand."""
    listing = []
    for number, kind in enumerate(kinds):
        path = f"{number}_{kind}" if number else ""
        listing.append({"idx": number, "name": str(number), "path": path, "type": KINDS[kind]})
        (folder / path).mkdir(exist_ok=True)
        if kind == "Pooling":
            settings = {"word_embedding_dimension": 64} | pooling
            (folder / path / "config.json").write_text(json.dumps(settings))
    (folder / "modules.json").write_text(json.dumps(listing))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    append_eos_template(tokenizer)
    tokenizer.save_pretrained(folder)


def write_dense(folder: Path, weight: torch.Tensor, **settings) -> None:
    """A Dense as the third module."""
    rows, columns = weight.shape
    values = {"in_features": columns, "out_features": rows, "bias": False}
    values |= {"activation_function": "torch.nn.modules.linear.Identity"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(values | settings))
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")


def theirs(folder: Path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def refused(folder: Path, message: str, *readers) -> None:
    """Everything that reads models says the same."""
    for read in readers or (Embedder.from_pretrained, CubeModel.open, load_text_model):
        with pytest.raises(UserError, match=message):
            read(folder)


# Modules and pooling


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean pooling"),
        ({"pooling_mode": "cls"}, "cls pooling"),
        ({"pooling_mode": ["lasttoken", "mean"]}, r"lasttoken\+mean pooling"),
        ({"pooling_mode_cls_token": True, "pooling_mode_lasttoken": True}, r"cls\+lasttoken"),
        ({}, "mean pooling"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_other_pooling(folder, backbone, pooling, name, trained):
    model = folder if trained else backbone
    write_modules(model, "Transformer", "Pooling", "Normalize", pooling=pooling)
    refused(model, rf"{name}.* Use sentence-transformers", Embedder.from_pretrained, CubeModel.open)


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        (("Transformer", "Own"), r"modules Transformer, modeling_own\.OwnPooling"),
        (("Transformer", "Pooling", "LayerNorm"), "modules Transformer, Pooling, LayerNorm"),
        (("Transformer", "Pooling", "Normalize", "Dense"), "Normalize, Dense"),
    ],
)
def test_other_modules(backbone, kinds, name):
    write_modules(backbone, *kinds)
    refused(backbone, name, Embedder.from_pretrained, CubeModel.open)


def test_modules_whose_tokenizer_appends_nothing(backbone):
    """sentence-transformers would read the last token of the text itself."""
    write_modules(backbone, "Transformer", "Pooling", "Normalize")
    make_tokenizer().save_pretrained(backbone)
    refused(backbone, "does not append one end token", Embedder.from_pretrained, CubeModel.open)
    assert isinstance(load_text_model(backbone, "cpu"), SentenceTransformersModel)


def test_a_dense_layer_that_only_cuts_is_ours_and_any_other_is_not(backbone):
    write_modules(backbone, "Transformer", "Pooling", "Dense", "Normalize")
    write_dense(backbone, torch.eye(16, 64))
    model = Embedder.from_pretrained(backbone, device="cpu")
    assert model.dim == 16
    np.testing.assert_allclose(model.encode(SPOKEN), theirs(backbone).encode(SPOKEN), atol=2e-6)
    others = (
        (torch.eye(16, 64).flip(0), {}),
        (2 * torch.eye(16, 64), {}),
        (torch.eye(16, 64), {"activation_function": "torch.nn.modules.activation.Tanh"}),
        (torch.eye(64, 64), {"use_residual": True}),
    )
    for weight, settings in others:
        write_dense(backbone, weight, **settings)
        refused(backbone, "a Dense layer .* does more than cut", Embedder.from_pretrained)


def test_modules_that_are_ours_are_read_as_sentence_transformers_does(backbone):
    write_modules(backbone, "Transformer", "Pooling", "Normalize")
    # no space at its end: sentence-transformers 5.2 would strip it where the text is empty
    settings = {"prompts": {"find": "find:"}, "default_prompt_name": "find"}
    (backbone / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (backbone / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    model, other = Embedder.from_pretrained(backbone, device="cpu"), theirs(backbone)
    assert model.max_seq_length == 9
    np.testing.assert_allclose(model.encode(TEXTS), other.encode(TEXTS), atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"do_lower_case": True}, "do_lower_case"),
        ({"config_args": {"is_causal": False}}, "is_caus"),
    ],
)
def test_settings_of_the_transformer_module(backbone, settings, name):
    (backbone / "sentence_bert_config.json").write_text(json.dumps(settings))
    refused(backbone, name)


@pytest.mark.parametrize(
    "kinds", [("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")]
)
def test_other_similarities(backbone, kinds):
    """Dot products are cosines only of vectors that are normalised."""
    write_modules(backbone, *kinds)
    path = backbone / "config_sentence_transformers.json"
    for name in ("euclidean", "dot"):
        path.write_text(json.dumps({"similarity_fn_name": name}))
        if name == "dot" and "Normalize" in kinds:
            Embedder.from_pretrained(backbone, device="cpu")
        else:
            refused(backbone, f"the similarity '{name}'", Embedder.from_pretrained, CubeModel.open)


def test_texts_cut_at_their_beginning(folder, world, tmp_path, capsys):
    change(folder / "tokenizer_config.json", truncation_side="left")
    refused(folder, "truncation_side 'left' keeps the end of a long text")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["truncation_side"]  # then that of tokenizer.json counts
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    cut = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    change(folder / "tokenizer.json", truncation=cut)
    refused(folder, "truncation_side 'left' keeps the end of a long text")
    model = shutil.copytree(world.backbone, tmp_path / "start")
    change(model / "tokenizer_config.json", truncation_side="left")
    assert train(world, tmp_path, model_path=str(model))[0] == 2
    assert "truncation_side 'left'" in capsys.readouterr().err


def test_teachers_and_mining_hand_such_folders_to_sentence_transformers_as_a_whole(folder):
    write_modules(folder, "Transformer", "Pooling", pooling={"pooling_mode_mean_tokens": True})
    expected = theirs(folder).encode(SPOKEN)
    model = load_text_model(folder, "cpu")
    assert isinstance(model, SentenceTransformersModel)
    np.testing.assert_allclose(model.encode(SPOKEN, normalize=False), expected, atol=2e-6)


@pytest.mark.parametrize("cut", [{}, {"dim": 16}])
def test_a_cut_that_sentence_transformers_saved_again(nested, tmp_path, cut):
    export_model(nested, tmp_path / "cut", **cut)
    other = theirs(tmp_path / "cut")
    other.save_pretrained(str(tmp_path / "saved"))
    model = Embedder.from_pretrained(tmp_path / "saved", device="cpu")
    assert model.dim == cut.get("dim", 64)
    np.testing.assert_allclose(model.encode(SPOKEN), other.encode(SPOKEN), atol=2e-6)


# Causality, foreign code, other weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_causal": False}, "is_causal false lets attention see later tokens"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention true lets"),
        ({"auto_map": {"AutoModel": "own.Model"}}, r"auto_map asks for code .*own\.Model.* remove"),
        (
            {"architectures": ["Qwen3BiModel"]},
            "architecture Qwen3BiModel is none of Qwen3Model",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, r"weights are quantized \(gptq\)"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_what_config_asks_for(folder, backbone, settings, message, trained):
    model = folder if trained else backbone
    change(model / "config.json", **settings)
    refused(model, rf"config\.json of .*{message}")


@pytest.mark.parametrize("settings", [{"is_causal": True}, {"use_bidirectional_attention": False}])
def test_causal_models_may_say_so(backbone, settings):
    expected = Embedder.from_pretrained(backbone, device="cpu").encode(SPOKEN)
    change(backbone / "config.json", **settings)
    assert_equal_vectors(Embedder.from_pretrained(backbone, device="cpu").encode(SPOKEN), expected)


def test_adapters_are_to_be_merged_first(backbone):
    adapter = backbone / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": "ada/base", "peft_type": "LORA"}))
    refused(backbone, r"LoRA adapter .* of ada/base, .*merge it first: .*merge_and_unload")
    (backbone / "config.json").unlink()
    refused(backbone, r"LoRA adapter .* of ada/base")


def rename(folder: Path, prefix: str, first: int = 0) -> None:
    weights = load_file(folder / "model.safetensors")
    renamed = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def test_weights_with_other_names(backbone):
    rename(backbone, "base_model.encoder.")
    message = r"other names than a Qwen3 model's: base_model\.encoder\..* rename"
    refused(backbone, message, Embedder.from_pretrained, load_text_model)


def test_weights_with_the_prefix_of_a_language_model(backbone):
    expected = Embedder.from_pretrained(backbone, device="cpu").encode(SPOKEN)
    rename(backbone, "model.")
    assert_equal_vectors(Embedder.from_pretrained(backbone, device="cpu").encode(SPOKEN), expected)


def test_weights_that_would_be_left_out(backbone):
    weights = load_file(backbone / "model.safetensors")
    weights["layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 64)
    save_file(weights, backbone / "model.safetensors", {"format": "pt"})
    refused(
        backbone, r"hold 1 tensors that are no part of .*q_proj\.lora_A", Embedder.from_pretrained
    )


# Parts that do not fit together


def test_more_tokens_than_rows(folder, backbone, world, tmp_path, capsys):
    for model in (folder, backbone):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"word{i}" for i in range(100)])
        tokenizer.save_pretrained(model)
        refused(model, r"tokenizer has 500 tokens, the model's token table 448 rows; resize")
    assert train(world, tmp_path, model_path=str(backbone))[0] == 2
    assert "500 tokens, the model's token table 448 rows; resize" in capsys.readouterr().err


def test_weights_that_another_program_saved_over(folder):
    other = theirs(folder)
    with torch.no_grad():
        other[0].auto_model.embed_tokens.weight.add_(0.05)
    expected = other.encode(SPOKEN)
    other.save_pretrained(str(folder))
    refused(folder, r"model\.safetensors changed after .* remove nested/ and ml_embed\.json")
    shutil.rmtree(folder / "nested")
    (folder / "ml_embed.json").unlink()
    found = Embedder.from_pretrained(folder, device="cpu").encode(SPOKEN)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_record_of_a_larger_model(folder):
    record = json.loads((folder / "ml_embed.json").read_text())
    del record["digest"]
    for sizes in ({"dims": [256, 8]}, {"exits": [1, 99]}):
        (folder / "ml_embed.json").write_text(json.dumps(record | sizes))
        refused(
            folder, r"ml_embed\.json names (256|64) components and (3|99) layers, config\.json 64"
        )


def test_weights_of_an_older_file_beside_the_newer(backbone):
    """One file counts, as in transformers, and shards left beside it do not."""
    config = load_backbone_config(backbone)
    table = map_table(backbone, config)
    older = {"embed_tokens.weight": torch.zeros_like(table)}
    save_file(older, backbone / "model-00001-of-00002.safetensors", {"format": "pt"})
    assert torch.equal(map_table(backbone, config), table)
    assert table.any()


def test_the_remedy_for_a_folder_without_nested_parts(backbone, tmp_path):
    """A whole table and one norm: there is only the record to remove."""
    assert "changed after the folder was written, so ml_embed.json and the" in str(
        stale(backbone, "model.safetensors")
    )


def test_changed_settings_are_a_warning(folder, caplog):
    Embedder.from_pretrained(folder, device="cpu")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True))
    Embedder.from_pretrained(folder, device="cpu")
    assert not caplog.records, "another layout of the same values is no change"
    change(path, rms_norm_eps=1e-3)
    Embedder.from_pretrained(folder, device="cpu")
    assert "config.json changed after the folder was written" in caplog.text


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "tokenizer.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "model.safetensors",
        "nested/exit_norms.safetensors",
    ],
)
def test_verify_compares_every_file(folder, file):
    verify_model(folder)
    path = folder / file
    if path.suffix == ".json":
        change(path, something_new=1)
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"has changed since it was written: {file} was \w+, now"):
        verify_model(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"{file}|lacks"):
        verify_model(folder)


def test_a_changed_record_is_named(folder):
    change(folder / "ml_embed.json", exits=[3])
    refused(folder, r"ml_embed\.json has changed since it was written", verify_model)


def test_a_backbone_has_nothing_to_verify(backbone, caplog):
    verify_model(backbone)
    assert "has no digests to compare with" in caplog.text


def test_prompts_and_length_that_were_edited_are_obeyed(folder):
    change(folder / "config_sentence_transformers.json", prompts={"new": "new: "})
    change(folder / "sentence_bert_config.json", max_seq_length=7)
    model = Embedder.from_pretrained(folder, device="cpu")
    assert (model.prompts, model.max_seq_length) == ({"new": "new: "}, 7)
    change(folder / "config_sentence_transformers.json", default_prompt_name="gone")
    refused(folder, "default_prompt_name 'gone' is none of its prompts")


# Weights that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("model.safetensors", "layers.1.mlp.up_proj.weight"),
        ("nested/embedding_factors.safetensors", "A"),
        ("nested/exit_norms.safetensors", "1"),
    ],
)
def test_weights_that_are_not_finite(folder, file, tensor, value):
    spoil(folder / file, tensor, value)
    reseal(folder)
    message = rf"{file}: the tensor {tensor} has NaN or infinity"
    refused(folder, message, lambda f: CubeModel.open(f).encoder, load_text_model)
    if tensor != "1":
        refused(folder, message, Embedder.from_pretrained)


def spoil(path: Path, tensor: str, value: float) -> None:
    weights = load_file(path)
    weights[tensor].view(-1)[3] = value
    save_file(weights, path, {"format": "pt"})


def test_a_backbone_that_is_not_finite(backbone, world, tmp_path, capsys):
    spoil(backbone / "model.safetensors", "embed_tokens.weight", float("nan"))
    message = r"backbone/model\.safetensors: the tensor embed_tokens\.weight has NaN"
    refused(backbone, message, Embedder.from_pretrained, load_text_model)
    model = shutil.copytree(world.backbone, tmp_path / "start")
    spoil(model / "model.safetensors", "layers.1.mlp.up_proj.weight", float("nan"))
    assert train(world, tmp_path, model_path=str(model))[0] == 2
    said = capsys.readouterr().err
    assert "model.safetensors: the tensor layers.1.mlp.up_proj.weight has NaN" in said
    assert "learning_rate" not in said


def test_vectors_that_overflow(backbone, tmp_path):
    """Weights may be finite, and what is computed with them not."""
    weights = load_file(backbone / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        weights[f"layers.1.mlp.{name}.weight"].fill_(1e30)
    save_file(weights, backbone / "model.safetensors", {"format": "pt"})
    message = r"the model gives NaN or infinity for the text '(Where|Here)"
    refused(backbone, message, lambda f: load_text_model(f).encode(["Where?", "Here."]))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"query": "Where?", "passage": "Here.", "negatives": ["No."]}))
    refused(backbone, message, lambda f: evaluate_cube(f, data))


def test_large_weights_are_finite(backbone):
    """Their sum is not."""
    weights = load_file(backbone / "model.safetensors")
    weights["norm.weight"][:] = 3e38
    save_file(weights, backbone / "model.safetensors", {"format": "pt"})
    assert isinstance(load_text_model(backbone, "cpu"), OwnModel)


# Training


def test_the_prompts_of_the_start_model_survive_training(world, tmp_path):
    start = shutil.copytree(world.backbone, tmp_path / "start")
    write_modules(start, "Transformer", "Pooling", "Normalize")
    settings = {"prompts": {"query": "q: ", "document": "d: "}, "default_prompt_name": "query"}
    (start / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert train(world, tmp_path, model_path=str(start), train_steps=1)[0] == 0
    step = tmp_path / "run" / "step_1"
    model, other = Embedder.from_pretrained(step, device="cpu"), theirs(step)
    assert (model.prompts, model.default_prompt_name) == (settings["prompts"], "query")
    assert_equal_vectors(model.encode(SPOKEN), other.encode(SPOKEN))
    spoken = model.encode(["q: " + text for text in SPOKEN], prompt="")
    assert_equal_vectors(model.encode(SPOKEN), spoken)
    export_model(step, tmp_path / "cut", dim=16)
    assert Embedder.from_pretrained(tmp_path / "cut", device="cpu").default_prompt_name == "query"


@pytest.mark.parametrize("key", ["model_path", "teacher_model_path"])
def test_training_reads_as_everybody_does(world, tmp_path, capsys, key):
    start = shutil.copytree(world.backbone, tmp_path / "start")
    write_modules(start, "Transformer", "Pooling", pooling={"pooling_mode_mean_tokens": True})
    assert train(world, tmp_path, **{key: str(start)})[0] == 2
    assert "mean pooling" in capsys.readouterr().err


def test_the_card_says_what_was_trained_on(world, tmp_path):
    start = shutil.copytree(world.backbone, tmp_path / "start")
    (start / "README.md").write_text("---\nlicense: mit\nlanguage: sw\n---\n# Base\n")
    assert train(world, tmp_path, model_path=str(start), train_steps=1)[0] == 0
    card = (tmp_path / "run" / "step_1" / "README.md").read_text()
    for part in ("license: mit", "- sw", "## Training data", "| facts |", "| topics |"):
        assert part in card
