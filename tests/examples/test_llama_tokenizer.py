"""The tokenizers of the Llama example."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

for _module in ("grain", "tokenizers", "tqdm"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from examples.llama.checks import InputError
from examples.llama.config import END_OF_DOCUMENT, DataConfig
from examples.llama.tokenizer import check_tokenizer, encode, load_tokenizer
from tests.examples.llama_data_fixtures import make_documents, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file):
    return load_tokenizer(str(tokenizer_file))


@given(st.text())
@settings(max_examples=100)
def test_tokens_give_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_document_cannot_end_itself(tokenizer):
    text = f"before {END_OF_DOCUMENT} after"
    ids = encode([text], tokenizer, END_OF_DOCUMENT).tolist()
    assert ids.index(tokenizer.token_to_id(END_OF_DOCUMENT)) == len(ids) - 1
    assert tokenizer.decode(ids[:-1]) == text


def test_the_settings_of_a_tokenizer_file_do_not_change_the_tokens(
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


def test_a_model_that_has_special_tokens_among_its_pieces(tmp_path):
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
    # The model need not know the special tokens at the end.
    config = DataConfig(tokenizer="unigram.json", end_of_document="</s>")
    check_tokenizer(loaded, config, len(pieces) - 1)
    with pytest.raises(InputError, match=f"has {len(pieces) - 1} tokens"):
        check_tokenizer(loaded, config, len(pieces) - 2)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_tokens_are_as_narrow_as_the_vocabulary_allows(size, dtype):
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
    monkeypatch.setattr("examples.llama.tokenizer.Tokenizer", hub)
    assert load_tokenizer("t5-base").encode_special_tokens
    assert asked == ["t5-base"]
