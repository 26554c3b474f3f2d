"""Tokenizers of the Llama example."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

for _module in ("grain", "tokenizers", "tqdm"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from examples.llama.config import END_OF_DOCUMENT, DataConfig
from examples.llama.data.tokenizer import (
    check_tokenizer,
    encode,
    load_tokenizer,
    report_loss,
)
from examples.training.checks import InputError
from tests.examples.data_fixtures import make_documents, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return load_tokenizer(str(tokenizer_file))


@given(st.text())
@settings(max_examples=100)
def test_tokens_decode_to_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_document_cannot_end_itself(tokenizer):
    text = f"before {END_OF_DOCUMENT} after"
    ids = encode([text], tokenizer, END_OF_DOCUMENT).tolist()
    assert ids.index(tokenizer.token_to_id(END_OF_DOCUMENT)) == len(ids) - 1
    assert tokenizer.decode(ids[:-1]) == text


def test_settings_in_a_tokenizer_file_do_not_change_the_tokens(
    tokenizer, tokenizer_file, tmp_path
):
    other = Tokenizer.from_file(str(tokenizer_file))
    other.add_special_tokens(["[BOS]"])
    other.enable_truncation(4)
    other.enable_padding(length=64)
    other.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", other.token_to_id("[BOS]"))]
    )
    other.save(str(tmp_path / "other.json"))
    loaded = load_tokenizer(str(tmp_path / "other.json"))
    documents = [*make_documents(3, 20), f"x {END_OF_DOCUMENT} y"]
    np.testing.assert_array_equal(
        encode(documents, loaded, END_OF_DOCUMENT),
        encode(documents, tokenizer, END_OF_DOCUMENT),
    )


def test_a_model_with_special_tokens_among_its_pieces(tmp_path):
    pieces = ["<unk>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz</>", "<extra>"]
    model = models.Unigram([(p, -float(i > 1)) for i, p in enumerate(pieces)], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>", "<extra>"])
    tokenizer.save(str(tmp_path / "unigram.json"))
    loaded = load_tokenizer(str(tmp_path / "unigram.json"))
    assert "</s>" in loaded.encode("ab</s>cd").tokens
    assert "<extra>" in loaded.encode("ab<extra>cd").tokens
    ids = encode(["a<extra>b</s>cd", "", "é"], loaded, "</s>").tolist()
    tokens = [loaded.id_to_token(i) for i in ids]
    assert tokens == [*"▁abcd", "</s>", "</s>", "▁", "<unk>", "</s>"]
    # The model needs no embeddings for the special tokens at the end.
    config = DataConfig(tokenizer="unigram.json", end_of_document="</s>")
    check_tokenizer(loaded, config, len(pieces) - 1)
    with pytest.raises(InputError, match=f"has {len(pieces) - 1} tokens"):
        check_tokenizer(loaded, config, len(pieces) - 2)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_token_dtype_is_the_narrowest_for_the_vocabulary(size, dtype):
    vocab = {f"w{i}": i for i in range(size - 1)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.add_special_tokens(["end"])
    stream = encode(["w7", "unknown"], tokenizer, "end")
    assert stream.dtype == dtype
    assert stream.tolist() == [7, size - 1, 0, size - 1]


def test_a_tokenizer_from_the_hub(monkeypatch, tokenizer_file):
    asked = []

    def from_pretrained(name):
        asked.append(name)
        return Tokenizer.from_file(str(tokenizer_file))

    hub = types.SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setattr("examples.llama.data.tokenizer.Tokenizer", hub)
    assert load_tokenizer("t5-base").encode_special_tokens
    assert asked == ["t5-base"]


# Text that a tokenizer loses


LETTERS = "abcdefghijklmnopqrstuvwxyz"
LOSS = DataConfig(tokenizer="given.json")


def finish(model, pre_tokenizer, decoder=None):
    """Build a tokenizer that adds the end of a document to a model."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer


def bpe(pre_tokenizer, pieces=LETTERS, **settings):
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return finish(models.BPE(vocab=vocab, merges=[], **settings), pre_tokenizer)


def word_piece():
    pieces = ["[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.WordPiece(vocab, unk_token="[UNK]")
    return finish(model, pre_tokenizers.Whitespace())


def unigram(unk_id, pieces=("<unk>", "▁", *LETTERS)):
    model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=unk_id)
    # As in T5's, each word begins with a piece that covers none of its characters.
    before = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    return finish(model, pre_tokenizers.Sequence(before), decoders.Metaspace())


def every_kind():
    words = pre_tokenizers.Whitespace()
    return {
        "BPE without an unknown token": bpe(words),
        "BPE, not split into words": bpe(None),
        "BPE with an unknown token": bpe(
            words, ["<unk>", *LETTERS], unk_token="<unk>", fuse_unk=True
        ),
        "byte-level BPE with missing bytes": bpe(
            pre_tokenizers.ByteLevel(add_prefix_space=True), ["Ġ", *LETTERS]
        ),
        "WordPiece": word_piece(),
        "Unigram": unigram(0),
    }


KINDS = every_kind()
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_the_share_of_lost_text_is_reported(kind, capsys):
    documents = ["one two\n", "", "  中 abc 文字 def", "end"]
    report_loss(KINDS[kind], LOSS, documents)
    assert capsys.readouterr().out == (
        "Warning: the tokenizer given.json has no token for 3 of the first 18 "
        "characters of the text (16.67%), which are lost.\n"
    )


@each_kind
def test_a_tokenizer_that_loses_nothing(kind, capsys):
    report_loss(KINDS[kind], LOSS, ["one two", "three\n  four\t"])
    report_loss(KINDS[kind], LOSS, [" ", ""])
    assert capsys.readouterr().out == ""


@each_kind
def test_a_tokenizer_that_loses_most_of_the_text_is_rejected(kind):
    message = (
        "tokenizer: given.json has no token for 30 of the first 33 characters of the "
        r"text \(90.91%\), which are lost; pass a tokenizer made for such text, or omit"
    )
    with pytest.raises(InputError, match=message):
        report_loss(KINDS[kind], LOSS, ["中文" * 15, "abc"])


def test_byte_level_tokenizers_lose_nothing(tokenizer, capsys):
    text = f"中文 é e\u0301 👩‍🚀\r\n {END_OF_DOCUMENT} "
    report_loss(tokenizer, LOSS, [text * 100])
    pieces = ["<unk>", "▁", *LETTERS, *(f"<0x{i:02X}>" for i in range(256))]
    settings = {"unk_token": "<unk>", "byte_fallback": True}
    report_loss(bpe(pre_tokenizers.Metaspace(), pieces, **settings), LOSS, ["中文 a b"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["NFC", "NFKC", "NFD", "NFKD", "Lowercase"])
def test_normalized_text_is_not_lost(name, tokenizer, capsys):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.normalizer = getattr(normalizers, name)()
    report_loss(other, LOSS, ["é e\u0301 한 \u1112\u1161\u11ab ﬁ … ABC"])
    assert capsys.readouterr().out == ""


def test_text_removed_by_a_normalizer_or_a_pre_tokenizer_is_lost(capsys):
    tokenizer = bpe(pre_tokenizers.Punctuation("removed"))
    tokenizer.normalizer = normalizers.Replace("0", "")
    report_loss(tokenizer, LOSS, ["abc, d0e."])
    assert "no token for 3 of the first 8 characters" in capsys.readouterr().out


def test_special_tokens_dropped_from_the_text_are_lost(capsys):
    pieces = ["<unk>", "▁", "</s>", *LETTERS, "<extra>"]
    tokenizer = unigram(0, pieces)
    tokenizer.add_special_tokens(["</s>", "<extra>"])
    tokenizer.encode_special_tokens = True
    config = DataConfig(tokenizer="given.json", end_of_document="</s>")
    report_loss(tokenizer, config, ["some text ab<extra>cd</s>ef"])
    assert "no token for 11 of the first 25 characters" in capsys.readouterr().out


def test_only_the_beginning_of_the_text_is_checked(capsys):
    def documents():
        yield "中" + "a" * 400_000
        yield "中" + "a" * 700_000
        raise AssertionError("the sample should end before this document")

    report_loss(KINDS["WordPiece"], LOSS, ["中 " + "a" * 50])
    assert "1 of the first 51 " in capsys.readouterr().out
    report_loss(KINDS["BPE without an unknown token"], LOSS, documents())
    assert "2 of the first 1,000,000 " in capsys.readouterr().out


@pytest.mark.parametrize(
    "tokenizer",
    [unigram(None, ["▁", *LETTERS]), finish(models.WordLevel({"a": 0}), None)],
    ids=["Unigram", "WordLevel"],
)
def test_a_tokenizer_that_lacks_an_unknown_token(tokenizer):
    message = r"tokenizer: cannot tokenize the text \(.*unk.*\); pass a tokenizer with"
    for use in (
        lambda: report_loss(tokenizer, LOSS, ["a", "中"]),
        lambda: encode(["a", "中"], tokenizer, END_OF_DOCUMENT),
    ):
        with pytest.raises(InputError, match=f"(?i){message}"):
            use()
    assert len(encode(["a"], tokenizer, END_OF_DOCUMENT)) >= 2
