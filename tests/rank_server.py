"""What the server imports of which ranks are forks (see `tests.ranks`): every framework, once, on the CPU."""

import gc
import importlib
import os
from types import SimpleNamespace

from tests.ranks import BARE, end_with_parent

MODULES = (
    "stagdist.training.pretrain",
    "stagdist.decode.frontend.generate",
    "torch._dynamo",  # any optimizer imports it
    "megatron.core.datasets.blended_megatron_dataset_builder",  # any training run imports it
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "deepspeed.module_inject.auto_ep_layer",  # any engine imports it
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.auto.tokenization_auto",  # the tokenizer of any model directory
    "transformers.convert_slow_tokenizer",
    "stagdist.serving.http_process",
)


def import_frameworks() -> None:
    """Import the modules and have DeepSpeed probe the compiler, which it does once per process that trains."""
    for module in MODULES:
        importlib.import_module(module)
    importlib.import_module("deepspeed").ops.__compatible_ops__  # noqa: B018


def keep_frozen() -> None:
    """Keep engines from unfreezing: the garbage collector of a rank would search, and so copy, all modules."""
    stand_in = SimpleNamespace(freeze=lambda: None, unfreeze=lambda: None)
    vars(importlib.import_module("stagdist.decode.operations"))["gc"] = stand_in


end_with_parent()
gc.disable()  # nothing that is imported becomes garbage
if BARE not in os.environ:
    import_frameworks()
    keep_frozen()
gc.enable()
gc.freeze()  # no rank searches the modules for garbage
