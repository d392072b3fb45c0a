"""Mutated files of a tokenizer's directory."""

import shutil
from codecs import BOM_UTF8
from pathlib import Path

import pytest

from stagdist.data.tokenizer_files import load_tokenizer
from stagdist.errors import DataError
from tests.data.foreign_tokenizers import make
from tests.fuzz.mutations import mutations

TEXT = "the cat sat é 日本 <tool>"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama_3", "tokenizer.json"),
        ("llama_2", "tokenizer.json"),
        ("llama_2", "tokenizer_config.json"),
        ("added_tokens", "special_tokens_map.json"),
        ("sentencepiece_model", "tokenizer.model"),
        ("llama_3", "chat_template.jinja"),
    ],
)
def test_a_damaged_file_is_one_line_or_loads_what_it_says(
    kind: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = make(kind, tmp_path / "source")
    content = (source / name).read_bytes()
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    refused = 0
    for mutation in mutations(content, others=[BOM_UTF8 + content, content.replace(b"\n", b"\r\n"), b"null", b"[{}]"]):
        (folder / name).write_bytes(mutation.content)
        try:
            tokenizer = load_tokenizer(folder)
            tokenizer.encode_prompt(TEXT)
            tokenizer.decode(tokenizer.encode(TEXT))
        except DataError as error:
            refused += 1
            assert "\n" not in str(error), mutation.name
            assert str(folder) in str(error), mutation.name
            assert not mutation.content.startswith(BOM_UTF8 + b"{") or "save it without one" in str(error)
        printed = capfd.readouterr()
        assert printed.out == printed.err == "", mutation.name
    assert refused
