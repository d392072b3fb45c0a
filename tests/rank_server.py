"""What the server imports of which ranks are forks (see `tests.ranks`): every framework, once, on the CPU."""

import importlib

from tests.ranks import end_with_parent

end_with_parent()
# The last two are imported when an optimizer or an engine is built.
ON_USE = ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")
for module in ("stagdist.training.pretrain", "stagdist.decode.engine", *ON_USE):
    importlib.import_module(module)
