"""Preset shapes, random weights on disk, and tokenizers trained on text."""

import json
import os
import subprocess
import sys
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, Qwen3Model

from ml_embed.errors import UserError
from ml_embed.model_folders.backbone import PRESETS, backbone_config, init_backbone, table_rows
from ml_embed.prepare.tokenizer import load_tokenizer
from ml_embed.prepare.tokenizer_training import EOS_TOKEN, PAD_TOKEN, read_texts, train_tokenizer

QWEN3_TOKENIZER = os.environ.get("ML_EMBED_QWEN3_TOKENIZER", "")
QWEN3_VOCAB = 151_936
TEXTS = [
    "All human beings are born free and equal in dignity and rights.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "人人生而自由，在尊严和权利上一律平等。",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.",
    "It's 1948, don't you know?",
] * 4
HARD_TEXTS = [
    "Ünïcödé e\u0301 ñ",  # NFC joins the accent
    "12345 and 3.14159",
    "tabs\tand\r\nline ends\n\n  and spaces   ",
    "ไม่เคยเห็น 🧪👩‍🔬 \u0000\u0007 ꦗꦮ 𐐀",  # letters that training never saw
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return init_backbone("tiny", tokenizer, tmp_path_factory.mktemp("backbone") / "tiny", seed=3)


def parameters_by_formula(preset: str, vocab_size: int) -> tuple[int, int]:
    """(all, without the token table), from the architecture, not from the model."""
    hidden, mlp, layers, heads, kv_heads, head_dim = {
        "tiny": (128, 384, 6, 4, 2, 32),
        "80M": (320, 2048, 8, 16, 8, 128),
        "160M": (640, 1536, 9, 16, 8, 128),
        "330M": (896, 2560, 16, 16, 8, 128),
        "0.6B": (1024, 3072, 28, 16, 8, 128),
        "1.7B": (2048, 6144, 28, 16, 8, 128),
        "4B": (2560, 9728, 36, 32, 8, 128),
        "8B": (4096, 12288, 36, 32, 8, 128),
        "14B": (5120, 17408, 40, 40, 8, 128),
    }[preset]
    attention = (
        2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim + 2 * head_dim
    )  # q, o; k, v; norms
    body = layers * (attention + 3 * hidden * mlp + 2 * hidden) + hidden
    return body + vocab_size * hidden, body


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_shapes(preset):
    config = backbone_config(preset, QWEN3_VOCAB, eos_token_id=1, pad_token_id=0)
    with torch.device("meta"):
        model = Qwen3Model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    table = model.get_input_embeddings().weight.numel()
    assert (total, total - table) == parameters_by_formula(preset, QWEN3_VOCAB)
    if preset != "tiny":  # the name counts the token table
        named = float(preset[:-1]) * {"M": 1e6, "B": 1e9}[preset[-1]]
        assert total == pytest.approx(named, rel=0.06)


def test_config_is_that_of_qwen3():
    config = backbone_config("0.6B", QWEN3_VOCAB, eos_token_id=5, pad_token_id=4)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert (config.rms_norm_eps, config.max_position_embeddings, config.tie_word_embeddings) == (
        1e-6,
        40960,
        True,
    )
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (QWEN3_VOCAB, 5, 4)
    assert not config.attention_bias


def test_folder_loads(folder, tokenizer):
    model = AutoModel.from_pretrained(folder)
    assert type(model) is Qwen3Model
    assert model.dtype == torch.float32
    assert model.config.vocab_size == 448  # 400 rounded up to a multiple of 64
    assert sorted(file.suffix for file in folder.iterdir()) == [".json"] * 3 + [".safetensors"]
    assert all(file.stat().st_mode & 0o444 == 0o444 & ~current_umask() for file in folder.iterdir())
    assert not list(folder.parent.glob(".*")), "something was left behind"
    ids = torch.tensor([tokenizer("free and equal").input_ids])
    hidden = model(ids).last_hidden_state
    assert hidden.shape == (1, ids.shape[1], 128)
    assert hidden.isfinite().all()
    assert hidden.std() > 0.1


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_seed_decides_the_weights_and_nothing_else(folder, tokenizer, tmp_path):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    same = init_backbone("tiny", tokenizer, tmp_path / "same", seed=3)
    assert torch.equal(torch.rand(3), expected), "the caller's random state was moved"
    other = init_backbone("tiny", tokenizer, tmp_path / "other", seed=4)
    weights, again, others = (
        load_file(path / "model.safetensors") for path in (folder, same, other)
    )
    assert weights.keys() == again.keys() == others.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not any(
        torch.equal(weights[name], others[name]) for name in weights if "norm" not in name
    )


def test_dtype_and_larger_vocabulary(tokenizer, tmp_path):
    path = init_backbone("tiny", tokenizer, tmp_path / "b", dtype="bfloat16", vocab_size=1000)
    weights = load_file(path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights["embed_tokens.weight"].shape == (1024, 128)
    assert AutoModel.from_pretrained(path).dtype == torch.bfloat16


def test_tokenizer_saved_is_tokenizer_in_memory(folder, tokenizer):
    for loaded in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert (loaded.eos_token, loaded.pad_token) == (EOS_TOKEN, PAD_TOKEN)
        assert (loaded.eos_token_id, loaded.pad_token_id) == (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
        assert loaded.model_max_length == tokenizer.model_max_length == 40960
        for text in TEXTS + HARD_TEXTS:
            assert loaded(text).input_ids == tokenizer(text).input_ids


def test_tokenizer_writes_any_text(tokenizer):
    for text in TEXTS + HARD_TEXTS:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
        assert tokenizer.eos_token_id not in ids  # nothing is appended
    # Apart from each other: of neighbouring marks, NFC's order differs between versions of Unicode
    # (U+07FD, say).
    characters = map(
        chr, [*range(0x800), *range(0x800, 0xD800, 0x3FF), *range(0xE000, 0x110000, 0x3FF)]
    )
    every_byte = " ".join(c for c in characters if unicodedata.normalize("NFC", c) == c)
    assert (
        tokenizer.decode(tokenizer(every_byte).input_ids)
        == every_byte
        == unicodedata.normalize("NFC", every_byte)
    )
    assert len(tokenizer) == 400
    assert tokenizer.convert_ids_to_tokens([0, 1]) == [PAD_TOKEN, EOS_TOKEN]


def test_tokenizer_merges_and_splits_like_qwen(tokenizer):
    assert len(tokenizer(" human").input_ids) < len(" human")
    digits = tokenizer.convert_ids_to_tokens(tokenizer("1948").input_ids)
    assert digits == ["1", "9", "4", "8"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("It's").input_ids)[-1] == "'s"
    assert tokenizer(EOS_TOKEN).input_ids == [tokenizer.eos_token_id]
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids


def test_smallest_tokenizer_is_bytes_only():
    tokenizer = train_tokenizer(["aaaa aaaa"], 258)
    assert len(tokenizer) == 258
    assert len(tokenizer("aaaa").input_ids) == 4
    assert len(train_tokenizer(["ab ab"], 16384)) < 300  # few texts offer few merges


def test_read_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\r\none\n", encoding="utf-8")
    rows = [{"q": "three", "n": 1, "list": ["two", "four"], "none": None}, {"q": "five\nsix"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    table = {
        "q": ["seven", None, "one"],
        "n": [1, 2, 3],
        "negatives": [["eight"], None, ["nine", "seven"]],
    }
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    (tmp_path / "ignored.csv").write_text("no")
    expected = ["one", "two", "three", "four", "five\nsix", "seven", "eight", "nine"]
    assert list(read_texts([tmp_path])) == expected
    assert list(read_texts([tmp_path / "b.jsonl", tmp_path / "a.txt"])) == [
        "three",
        "two",
        "four",
        "five\nsix",
        "one",
    ]


def test_text_mistakes(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"q": "x"}\n{"q": \n')
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "x.csv").write_text("a")
    for path, message in {
        "missing.txt": "does not exist",
        "empty": "holds no",
        "x.csv": "not read",
        "bad.jsonl": "line 2",
        "bad.parquet": "parquet",
        "bad.txt": "UTF-8",
    }.items():
        with pytest.raises(UserError, match=message):
            list(read_texts([tmp_path / path]))
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(read_texts([tmp_path / "blank.txt"]), 300)
    with pytest.raises(UserError, match="at least 258"):
        train_tokenizer(TEXTS, 257)


def test_backbone_mistakes(tokenizer, tmp_path):
    with pytest.raises(UserError, match="tiny, 80M"):
        init_backbone("81M", tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="float32, bfloat16"):
        init_backbone("tiny", tokenizer, tmp_path / "out", dtype="float16")
    with pytest.raises(UserError, match="400 ids"):
        init_backbone("tiny", tokenizer, tmp_path / "out", vocab_size=399)
    assert not (tmp_path / "out").exists()


def test_output_is_replaced_only_if_asked_and_only_if_a_model(folder, tokenizer, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    init_backbone("tiny", tokenizer, taken)  # an empty folder is free
    before = (taken / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        init_backbone("tiny", tokenizer, taken, seed=9)
    assert (taken / "model.safetensors").read_bytes() == before
    init_backbone("tiny", tokenizer, taken, seed=9, overwrite=True)
    assert (taken / "model.safetensors").read_bytes() != before
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not replaced"):
        init_backbone("tiny", tokenizer, precious, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "taken"]


def test_failure_leaves_the_old_folder(tokenizer, tmp_path, monkeypatch):
    path = init_backbone("tiny", tokenizer, tmp_path / "model")
    before = (path / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(UserError, match="disk full"):
        init_backbone("tiny", tokenizer, path, seed=1, overwrite=True)
    assert (path / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_script_trains_the_same_tokenizer_in_another_process(tokenizer, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(dict.fromkeys(TEXTS)), encoding="utf-8")
    command = [
        sys.executable,
        ROOT / "scripts" / "init_backbone.py",
        "--preset",
        "tiny",
        "--output",
        tmp_path / "out",
    ]
    command += ["--train-tokenizer", tmp_path / "texts.txt", "--vocab-size", "300"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    expected = train_tokenizer(read_texts([tmp_path / "texts.txt"]), 300).backend_tokenizer.to_str()
    assert json.loads(
        (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8")
    ) == json.loads(expected)
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 2
    command[command.index("300")], command[command.index(tmp_path / "out")] = (
        "0",
        tmp_path / "other",
    )
    none = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "vocab size 0 is too small" in none.stderr
    assert again.stderr.startswith("error: ")


@pytest.mark.skipif(
    not QWEN3_TOKENIZER,
    reason="ML_EMBED_QWEN3_TOKENIZER names no folder with Qwen3's tokenizer.json",
)
def test_qwen3_tokenizer(tmp_path):
    tokenizer = load_tokenizer(QWEN3_TOKENIZER)
    assert table_rows(tokenizer) == 151_680  # 151,669 ids
    assert table_rows(tokenizer, QWEN3_VOCAB) == QWEN3_VOCAB
    path = init_backbone("tiny", tokenizer, tmp_path / "qwen", dtype="bfloat16")
    loaded = AutoTokenizer.from_pretrained(path)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    for text in TEXTS + HARD_TEXTS:
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert AutoModel.from_pretrained(path).config.vocab_size == 151_680
