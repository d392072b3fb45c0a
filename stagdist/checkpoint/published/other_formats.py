"""What a directory without readable weights holds instead, and how to get one with them."""

from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

from stagdist.files import not_downloaded

_ELSEWHERE = "get the model with model*.safetensors from its source"
_CONVERT = ""  # the remedy of `converted`
_FORMATS = {
    "pytorch_model*": _CONVERT,
    "adapter_model.*": "they change another model: merge them into it with peft (merge_and_unload), and save that",
    "part_*.safetensors": "a training checkpoint: export it with tools/convert_checkpoint.py",
    "model.safetensors": "their config.json is missing: get it from their source",
    "model-*-of-*.safetensors": "their index, model.safetensors.index.json, is missing: get it from their source",
    **dict.fromkeys(
        ("*.distcp", "*/*.distcp", "*/mp_rank_*", "*/model_optim_rng.pt", "*/*/model_optim_rng.pt"),
        "a training checkpoint of another program: export a Hugging Face directory from it with that program",
    ),
    **dict.fromkeys(
        ("consolidated*", "*.gguf", "flax_model*", "tf_model*", "*.onnx", "*.safetensors", "*.pt*", "*.ckpt", "*.bin"),
        _ELSEWHERE,
    ),
}
"""Remedy by the names of files with weights that are not read; the first that matches is reported."""


def converted(folder: Path, dtype: str = "") -> str:
    """The command that converts a directory to one whose weights are read.

    Args:
        dtype: of the result; empty for that of the weights.
    """
    place = f"{str(folder)!r}" + (f", dtype='{dtype}'" if dtype else "")
    return (
        f"convert them with transformers: AutoModelForCausalLM.from_pretrained({place}).save_pretrained(NEW), and copy "
        "the files of the tokenizer to NEW"
    )


def unfinished_download(folder: Path) -> str:
    """The remains of a download in a directory or in the cache that it belongs to, with the remedy; empty if none."""
    endings = ("incomplete", "part", "aria2", "crdownload")
    for left in (
        *(path for end in endings for place in ("", ".cache/**/") for path in folder.glob(f"{place}*.{end}")),
        *folder.glob("../../blobs/*.incomplete"),
    ):
        return f"its download did not finish (it left {left.name}); start the download again"
    return ""


def weights_there(folder: Path) -> str:
    """What a directory has instead of weights that are read, with the remedy; empty if nothing looks like weights.

    The cache of a hub and the output of a trainer hold model directories in folders.
    """
    if unfinished := unfinished_download(folder):
        return unfinished
    for pattern, remedy in _FORMATS.items():
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            kept = not_downloaded(found[0])
            name = found[0].relative_to(folder)
            return kept or f"its weights are in {name}{more}; {remedy or converted(folder)}"
    inner = [path.parent for pattern in ("*/config.json", "snapshots/*/config.json") for path in folder.glob(pattern)]
    return f"give a folder in it, such as {max(inner, key=lambda at: (len(str(at)), at))}" if inner else ""


def save_as_utf8(path: Path) -> str:
    """The remedy for a JSON file with a byte order mark, which transformers refuses as well; empty without one."""
    marked = path.is_file() and path.read_bytes().startswith((BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE))
    return "; save it as UTF-8 without a byte order mark" if marked else ""
