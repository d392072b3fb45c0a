"""What the server imports of which ranks are forks (see `tests.ranks`): every framework, once, on the CPU."""

import importlib
import os

from tests.ranks import BARE, end_with_parent

MODULES = (
    "stagdist.training.pretrain",
    "stagdist.decode.frontend.generate",
    "torch._dynamo",  # any optimizer imports it
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "deepspeed.module_inject.auto_ep_layer",  # any engine imports it
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.auto.tokenization_auto",  # the tokenizer of any model directory
    "transformers.convert_slow_tokenizer",
)

end_with_parent()
for module in () if BARE in os.environ else MODULES:
    importlib.import_module(module)
