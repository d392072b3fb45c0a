"""Tokenizers of the kinds that published models have, made from a few words, as directories of Hugging Face files."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "the cat sat on the mat and the dog ran to the other cat",
    "def main(self, name): return name.x",
    "é 日本 👍",
] * 40

LLAMA_2_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] "
    "+ ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def write_json(path: Path, body: dict[str, Any]) -> None:
    """Write a file of settings."""
    path.write_text(json.dumps(body))


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer, trained on `TEXTS`; its special tokens come last."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return backend


def gpt_2(folder: Path) -> None:
    """Byte-level BPE with one special token, as GPT-2 and GPT-NeoX."""
    byte_level(["<|endoftext|>"]).save(str(folder / "tokenizer.json"))
    end = "<|endoftext|>"
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "unk_token": end},
    )


def sentencepiece_model(folder: Path) -> None:
    """SentencePiece with byte fallback and no tokenizer.json, as the first Llama."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=stream, vocab_size=340, model_type="bpe", byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(stream.getvalue())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "add_eos_token": False, **settings, "chat_template": LLAMA_2_CHAT},
    )


def llama_2(folder: Path) -> None:
    """Merges with byte fallback, `<s>` before every text and the template of Llama 2 in the configuration."""
    letters = sorted({letter for text in TEXTS for letter in text if letter.isascii() and letter != " "})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *letters]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("a", "t"), ("c", "at"), ("\u2581", "cat")]
    pieces += [first + second for first, second in merges]
    backend = tokenizers.Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, merges, byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in pieces[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
         "pad_token": "<unk>", "chat_template": LLAMA_2_CHAT},
    )  # fmt: skip


def llama_3(folder: Path) -> None:
    """Byte-level BPE with control tokens, `<|begin_of_text|>` before every text and a template in its own file."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = byte_level(special)
    begin = special[0]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin) or 0)]
            ),
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": "<|end_of_text|>",
         "model_input_names": ["input_ids", "attention_mask"]},
    )  # fmt: skip
    (folder / "chat_template.jinja").write_text(LLAMA_3_CHAT)


def added_tokens(folder: Path) -> None:
    """Added tokens that are text, special ones beside them, and the end token in special_tokens_map.json alone."""
    backend = byte_level(["<|endoftext|>", "<|stop|>", "<|fim|>"])
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("    ", normalized=True)])
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    stop = {"content": "<|stop|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(folder / "special_tokens_map.json", {"eos_token": stop, "pad_token": "<|endoftext|>"})


def no_end(folder: Path) -> None:
    """Byte-level BPE that says of no token that it ends a text."""
    byte_level(["<|endoftext|>"]).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def adds_end(folder: Path) -> None:
    """A Llama tokenizer whose configuration asks for an end token after every text too."""
    llama_2(folder)
    path = folder / "tokenizer_config.json"
    write_json(path, {**json.loads(path.read_text()), "add_bos_token": True, "add_eos_token": True})


KINDS: dict[str, Callable[[Path], None]] = {
    make.__name__: make for make in (gpt_2, sentencepiece_model, llama_2, llama_3, added_tokens, no_end, adds_end)
}


def make(kind: str, folder: Path) -> Path:
    """A directory with the files of a tokenizer."""
    folder.mkdir(parents=True)
    KINDS[kind](folder)
    return folder
