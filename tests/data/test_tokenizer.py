"""Tokenizers: round trips, bytes per token, directories that transformers loads."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from stagdist.data.tokenizer import END_OF_DOCUMENT, Tokenizer, byte_tokenizer, train_bpe
from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import ConfigError, DataError

TRICKY = "tabs\tand\r\nlines, caf\u00e9, \u6f22\u5b57, \U0001f642\U0001f468\u200d\U0001f469, a\u0301, \ufffd   "


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return byte_tokenizer()
    trained: Tokenizer = request.getfixturevalue("bpe")
    return trained


def texts(library_files: list[Path]) -> list[str]:
    return [TRICKY, f"a document about {END_OF_DOCUMENT} itself", "", " "] + [
        path.read_text(encoding="utf-8") for path in library_files
    ]


def test_text_survives_and_its_bytes_are_counted_exactly(tokenizer: Tokenizer, library_files: list[Path]) -> None:
    counts = tokenizer.token_bytes()
    assert counts.dtype == np.int32 and counts.shape == (tokenizer.vocab_size,)
    for text in texts(library_files):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert counts[ids].sum() == len(text.encode())


def test_special_tokens_stand_for_no_bytes_and_text_cannot_spell_them(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes()[tokenizer.end_of_document] == 0
    assert tokenizer.end_of_document not in tokenizer.encode(f"x{END_OF_DOCUMENT}y")
    assert tokenizer.decode([tokenizer.end_of_document]) == ""
    assert tokenizer.decode([tokenizer.end_of_document], skip_special_tokens=False) == END_OF_DOCUMENT


def test_batches_and_arrays_hold_the_same_ids(tokenizer: Tokenizer, library_files: list[Path]) -> None:
    some = texts(library_files)[:8]
    single = [tokenizer.encode(text) for text in some]
    assert tokenizer.encode_batch(some) == single
    arrays = tokenizer.encode_arrays(some, np.uint16)
    assert [array.tolist() for array in arrays] == [[*ids, tokenizer.end_of_document] for ids in single]


def test_byte_tokens_are_the_bytes_in_the_library_that_exports_use_too() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 257 and tokenizer.end_of_document == 256 and tokenizer.is_bytes
    assert tokenizer.encode(TRICKY) == list(TRICKY.encode())
    plain = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert plain.encode(TRICKY).ids == list(TRICKY.encode())
    assert tokenizer.token_bytes()[:256].tolist() == [1] * 256


def test_a_saved_directory_loads_in_transformers_and_here(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert theirs(TRICKY, add_special_tokens=False)["input_ids"] == tokenizer.encode(TRICKY)
    assert theirs.decode(tokenizer.encode(TRICKY)) == TRICKY
    assert theirs.eos_token_id == tokenizer.end_of_document and len(theirs) == tokenizer.vocab_size
    theirs.save_pretrained(str(tmp_path / "again"))
    for source in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json", tmp_path / "again"):
        loaded = load_tokenizer(source)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.end_of_document == tokenizer.end_of_document
        assert loaded.encode(TRICKY) == tokenizer.encode(TRICKY)


def test_a_foreign_directory_is_saved_with_everything_that_it_was_loaded_with(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "one")
    end = {"__type": "AddedToken", "content": END_OF_DOCUMENT, "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "note": 7, "model_max_length": 99}
    (tmp_path / "one" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "one" / "additional_chat_templates").mkdir()
    (tmp_path / "one" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    load_tokenizer(tmp_path / "one").save(tmp_path / "two")
    first, second = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                     for folder in (tmp_path / "one", tmp_path / "two"))  # fmt: skip
    assert first == second and len(first) == 4


def test_a_directory_that_does_not_name_its_class_is_saved_with_it(bpe: Tokenizer, tmp_path: Path) -> None:
    """Otherwise the config.json of the new directory would choose one."""
    bpe.save(tmp_path / "one")
    config = {"eos_token": END_OF_DOCUMENT, "note": 7, "model_max_length": 99}
    (tmp_path / "one" / "tokenizer_config.json").write_text(json.dumps(config))
    for source, target in (("one", "two"), ("two", "three")):
        load_tokenizer(tmp_path / source).save(tmp_path / target)
    again = json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())
    assert "tokenizer_class" in again and "is_local" not in again
    assert {key: again[key] for key in config} == config
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_files_without_tokenizer_json_are_loaded_by_transformers(tmp_path: Path) -> None:
    alphabet = json.loads(byte_tokenizer().to_json())["model"]["vocab"]
    vocab = {**alphabet, "th": 256, "<|endoftext|>": 257}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("this") == [256, ord("i"), ord("s")] and tokenizer.end_of_document == 257


def test_code_of_a_directory_is_not_run_whatever_standard_input_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    prompts = io.StringIO("y\nthe second prompt\n")
    monkeypatch.setattr("sys.stdin", prompts)
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists() and prompts.tell() == 0


def test_the_fingerprint_tells_tokenizers_apart_and_survives_pickling(bpe: Tokenizer) -> None:
    assert bpe.fingerprint != byte_tokenizer().fingerprint
    assert bpe.fingerprint != train_bpe(["other text, other merges " * 50], 300).fingerprint
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy.fingerprint == bpe.fingerprint and copy.encode(END_OF_DOCUMENT) == bpe.encode(END_OF_DOCUMENT)


def test_sentencepiece_like_tokens_count_their_bytes_and_others_are_refused() -> None:
    vocab = {"<unk>": 0, "</s>": 1, "<0xE6>": 2, "\u2581the": 3, "\u00e9": 4}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "</s>"])
    assert Tokenizer(backend.to_str(), "</s>").token_bytes().tolist() == [0, 0, 1, 4, 2]
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="byte-level"):
        Tokenizer(words.to_str(), "</s>").token_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"added_tokens": 5}'),
        ("tokenizer.json", '{"added_tokens": [5]}'),
        ("tokenizer.json", '{"added_tokens": [{"content": ["x"]}]}'),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"eos_token": 5}'),
    ],
    ids=lambda text: text[:40],
)
def test_a_file_of_another_make_is_named_in_one_line(bpe: Tokenizer, tmp_path: Path, name: str, content: str) -> None:
    bpe.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokenizers_that_cannot_work_are_refused_with_the_remedy(bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give `bytes`"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(DataError, match="eos_token"):
        _ = load_tokenizer(tmp_path).end_of_document
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<absent>"}))
    with pytest.raises(DataError, match="<absent>"):
        load_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no tokenizer\.json nor any other tokenizer$"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(ConfigError, match="257"):
        train_bpe(["text"], 256)
