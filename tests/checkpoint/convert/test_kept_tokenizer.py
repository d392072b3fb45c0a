"""Nothing of a foreign tokenizer is lost on the way through upcycling, importing and exporting."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stagdist.checkpoint.convert.import_model import import_model
from stagdist.checkpoint.convert.model_conversions import export
from stagdist.checkpoint.convert.staging import ConversionOptions
from stagdist.checkpoint.convert.upcycle import upcycle
from stagdist.data.tokenizer_files import load_tokenizer
from tests.checkpoint.convert.test_llama_import import save_llama
from tests.data.foreign_tokenizers import KINDS, make
from tests.data.test_foreign_tokenizers import assert_same

WITH_END = [kind for kind in KINDS if kind != "no_end"]


@pytest.mark.parametrize("kind", WITH_END)
@pytest.mark.parametrize("way", ["upcycle", "import and export"])
def test_the_written_directory_has_the_tokenizer_of_the_source(kind: str, way: str, tmp_path: Path) -> None:
    llama = make(kind, tmp_path / "llama")
    theirs: Any = AutoTokenizer.from_pretrained(str(llama))
    save_llama(llama, {"vocab_size": load_tokenizer(llama).vocab_size, "num_hidden_layers": 2})
    assert_same(AutoTokenizer.from_pretrained(str(llama)), load_tokenizer(llama))
    if way == "upcycle":
        folder = upcycle(llama, tmp_path / "new", [1, 1], ConversionOptions(), output_scale=0.0).directory
    else:
        import_model(llama, tmp_path / "run", None, ConversionOptions())
        folder = export(tmp_path / "run", tmp_path / "new", ConversionOptions()).directory
    again: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    assert again.special_tokens_map == theirs.special_tokens_map
    assert again.chat_template == theirs.chat_template
    assert_same(again, load_tokenizer(folder))
    assert_same(theirs, load_tokenizer(folder))
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] is not None
