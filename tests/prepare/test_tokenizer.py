"""One EOS, the right ids, and a fingerprint that survives saving."""

import copy
import os
import random
import threading
import time

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from ml_embed.errors import UserError
from ml_embed.files.model_source import find_tokenizer_folder
from ml_embed.prepare import time_limit
from ml_embed.prepare.tokenizer import (
    TextTokenizer,
    append_eos_template,
    fingerprint,
    load_tokenizer,
)
from ml_embed.prepare.tokenizer_training import train_tokenizer

TEXTS = [
    "hello world",
    "",
    "naïve café 漢字 🙂",
    "a much longer text, one of more tokens than are allowed, so that it must be cut somewhere",
    "ends in <eos>",
    "<eos>",
    "  spaces \n and\tlines ",
]


def train_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, a text of more words than one"] * 4, trainer)
    return backend


def make_tokenizer(kind=PreTrainedTokenizerFast, **tokens):
    tokens = {"eos_token": "<eos>", "pad_token": "<pad>"} | tokens
    backend = train_backend()
    if kind is Qwen2Tokenizer:
        vocab = backend.get_vocab()
        return Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=None, **tokens)
    return kind(tokenizer_object=backend, **tokens)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def with_bos(tokenizer):
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


def test_ids_are_those_of_the_text_alone_then_one_eos(tokenizer):
    for text, ids in zip(TEXTS, TextTokenizer(tokenizer, 1000)(TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == [
            *tokenizer(text, add_special_tokens=False).input_ids,
            tokenizer.eos_token_id,
        ]


def test_truncation_keeps_one_eos(tokenizer):
    for text, ids in zip(TEXTS, TextTokenizer(tokenizer, 8)(TEXTS), strict=True):
        assert ids.tolist() == [
            *tokenizer(text, add_special_tokens=False).input_ids[:7],
            tokenizer.eos_token_id,
        ]
    assert len(TextTokenizer(tokenizer, 8)(TEXTS)[3]) == 8


def test_a_text_that_ends_in_the_eos_string_gets_its_own_eos_all_the_same(tokenizer):
    ids = TextTokenizer(tokenizer, 1000)(["ends in <eos>"])[0]
    assert ids[-2:].tolist() == [tokenizer.eos_token_id] * 2


@pytest.mark.parametrize("prepare", [lambda t: t, with_bos, lambda t: append_eos_template(t) or t])
def test_post_processor_changes_nothing(tokenizer, prepare):
    plain = TextTokenizer(tokenizer, 12)(TEXTS)
    prepared = prepare(make_tokenizer())
    for expected, ids in zip(plain, TextTokenizer(prepared, 12)(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, expected)


def test_the_callers_tokenizer_is_not_touched(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=5)
    before = tokenizer.backend_tokenizer.to_str()
    ids = TextTokenizer(tokenizer, 1000)([TEXTS[3]])[0]
    assert tokenizer.backend_tokenizer.to_str() == before
    assert len(ids) > 5


def test_max_length_that_leaves_no_room_is_an_error(tokenizer):
    with pytest.raises(UserError, match="at least 2"):
        TextTokenizer(tokenizer, 1)


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, Qwen2Tokenizer])
@pytest.mark.parametrize("prepare", [lambda t: t, with_bos])
def test_saved_tokenizer_gives_the_training_ids(tmp_path, kind, prepare):
    tokenizer = prepare(make_tokenizer(kind))
    before = fingerprint(tokenizer)
    expected = TextTokenizer(tokenizer, 9)(TEXTS)
    append_eos_template(tokenizer)
    once = tokenizer.backend_tokenizer.to_str()
    append_eos_template(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == once
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    for text, ids in zip(TEXTS, expected, strict=True):
        assert saved(text, truncation=True, max_length=9).input_ids == ids.tolist()
    assert fingerprint(saved) == before


def test_an_eos_that_is_there_is_not_doubled(tokenizer):
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B:1 <eos>:1", special_tokens=[("<eos>", eos)]
    )
    append_eos_template(tokenizer)
    assert tokenizer("hello").input_ids[-2:].count(eos) == 1


def test_fingerprint_tells_vocabularies_apart(tokenizer):
    other = make_tokenizer()
    assert fingerprint(other) == fingerprint(tokenizer)
    other.add_tokens(["wholly_new"])
    assert fingerprint(other) != fingerprint(tokenizer)


def test_loading_problems_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer folder .*nowhere does not exist"):
        find_tokenizer_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds none of tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"broken": ')
    with pytest.raises(UserError, match="Check that its files are whole"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        find_tokenizer_folder(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("missing", ["eos_token", "pad_token"])
def test_eos_and_pad_are_required(tmp_path, missing):
    make_tokenizer(**{missing: None}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"has no {missing}"):
        load_tokenizer(tmp_path)
    if missing == "pad_token":  # a new backbone gives it one
        assert load_tokenizer(tmp_path, needs_padding=False).pad_token is None


# --- long texts, of which only a beginning is tokenized

PIECES = [
    "a", "Wort", "1", "23", "٣", "½", "字", "か\u3099", "한", "\u1112\u1161\u11ab", "ſ", "\ufb1d",
    "𝒳", "🙂", "👩‍👩‍👧", "e\u0301", "\u0301", "\u0338", "\u0344", "<", "=", "。", "，", "'s", "'LL",
    "'", "...", " .", "-----", "\ufeff", "\0", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u0085",
    "\u00a0", "\u2000", "\u2028", "\u3000", "\x1c", "\u180e", "\u200b", "<|im_end|>", "<|im_",
    "end|>", "<think>", "<|endoftext|>",
]  # fmt: skip


def assert_ids_are_those_of_the_whole_text(tokenizer):
    """Random texts of few and of many kinds of pieces, cut at many places."""
    generator = random.Random(0)
    encoders = [TextTokenizer(tokenizer, length) for length in (2, 3, 6)]
    shortened = 0
    for _ in range(1500):
        kinds = generator.sample(PIECES, generator.choice([2, 3, 6, 40]))
        text = "".join(generator.choices(kinds, k=generator.randrange(1, 60)))
        ids = tokenizer(text, add_special_tokens=False).input_ids
        for encoder in encoders:
            [encoding] = encoder.tokenize([text])
            shortened += len(encoding) < len(ids)
            [got] = encoder.token_ids([encoding])
            assert got.tolist() == [*ids[: encoder.max_length - 1], encoder.eos_id], (
                text,
                encoder.max_length,
            )
    assert shortened > 500


@pytest.fixture(scope="module")
def like_qwen():
    return train_tokenizer(
        ["".join(PIECES), "Wort für Wort, <think> ...", "123 a\n\n\n  b"] * 3, vocab_size=400
    )


def test_the_beginning_of_a_long_text_gives_the_ids_of_the_whole(like_qwen, monkeypatch):
    monkeypatch.setattr("ml_embed.prepare.tokenizer.BEGINNING_CHARACTERS", 1)
    assert_ids_are_those_of_the_whole_text(like_qwen)


@pytest.mark.parametrize("text", ["word " * 100_000, "7" * 500_000, ("字" * 30 + "\n") * 10_000])
def test_a_long_text_costs_what_is_kept_of_it(like_qwen, text):
    [encoding] = TextTokenizer(like_qwen, 100).tokenize([text])
    assert 99 <= len(encoding) < 5000


def test_a_beginning_with_too_few_ids_is_made_longer():
    like_qwen = train_tokenizer(["x" * 64] * 3, vocab_size=400)
    text = ("x" * 64 + " ") * 100
    [encoding] = TextTokenizer(like_qwen, 10).tokenize([text])
    ids = like_qwen(text, add_special_tokens=False).input_ids
    assert encoding.ids == ids[: len(encoding)]
    assert 9 <= len(encoding) < len(ids)
    blank = " " * 50_000 + "end"
    expected = like_qwen(blank, add_special_tokens=False).input_ids[:9]
    assert TextTokenizer(like_qwen, 10)([blank])[0].tolist() == [*expected, like_qwen.eos_token_id]


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("two words"),
        AddedToken("box1end"),
        AddedToken("<left>", lstrip=True),
        AddedToken("<alone>", single_word=True),
        None,
    ],
)
def test_a_tokenizer_that_may_look_beyond_a_cut_is_given_whole_texts(token):
    """Added tokens of such kinds, and other pre-tokenizations than Qwen's."""
    tokenizer = (
        make_tokenizer() if token is None else train_tokenizer(["some words"], vocab_size=300)
    )
    if token is not None:
        tokenizer.add_tokens([token])
    text = "some words 123\n" * 100
    [encoding] = TextTokenizer(tokenizer, 3).tokenize([text])
    assert encoding.ids == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.skipif(
    "ML_EMBED_QWEN3_TOKENIZER" not in os.environ,
    reason="ML_EMBED_QWEN3_TOKENIZER names no folder with tokenizer.json",
)
def test_with_the_qwen3_tokenizer(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(os.environ["ML_EMBED_QWEN3_TOKENIZER"])
    with monkeypatch.context() as changed:
        changed.setattr("ml_embed.prepare.tokenizer.BEGINNING_CHARACTERS", 1)
        assert_ids_are_those_of_the_whole_text(tokenizer)
    texts = [*TEXTS, "a<|im_end|>", "e\u0301 is normalised", "x" * 300]
    expected = TextTokenizer(tokenizer, 16)(texts)
    for text, ids in zip(texts, expected, strict=True):
        assert ids.tolist() == [
            *tokenizer(text, add_special_tokens=False).input_ids[:15],
            tokenizer.eos_token_id,
        ]
    before = fingerprint(tokenizer)
    append_eos_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    saved = load_tokenizer(tmp_path)
    assert fingerprint(saved) == before
    for text, ids in zip(texts, expected, strict=True):
        assert saved(text, truncation=True, max_length=16).input_ids == ids.tolist()


def test_a_pattern_that_breaks_on_a_text_is_named(tokenizer):
    """Beyond its own limit of steps the library panics, which is no Exception."""
    endless = copy.deepcopy(tokenizer)
    steps = [pre_tokenizers.Split(Regex("(a+)+$"), "isolated"), pre_tokenizers.ByteLevel()]
    endless.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    text = "a" * 30 + "b"
    with pytest.raises(UserError, match=f"31 characters, '{text}'.* another pattern"):
        TextTokenizer(endless, 16)(["short", text, "another"])


def test_a_pattern_that_finds_no_end_is_named(monkeypatch):
    """Below that limit, at each of a text's places, it may take hours."""
    monkeypatch.setattr(time_limit, "SECONDS", 0.5)
    ended = threading.Event()

    def encode(texts: list[str]) -> list[str]:
        if "endless" in texts:
            ended.wait()
        return texts

    assert time_limit.watched(encode, ["short"]) == ["short"]
    with pytest.raises(UserError, match=r"7 characters, 'endless' \(its pattern finds no end"):
        time_limit.watched(encode, ["short", "endless", "another"])
    ended.set()


def test_a_machine_that_stood_still_is_no_fault_of_a_text(monkeypatch):
    monkeypatch.setattr(time_limit, "SECONDS", 0.5)
    calls = []

    def encode(texts: list[str]) -> list[str]:
        calls.append(texts)
        time.sleep(1.0 if len(calls) == 1 else 0)
        return texts

    assert time_limit.watched(encode, ["one", "two"]) == ["one", "two"]
    assert len(calls) == 4, "together, each alone, together again"
