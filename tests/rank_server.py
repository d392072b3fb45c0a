"""What the server imports of which ranks are forks (see `tests.ranks`): every framework, once, on the CPU."""

import importlib

from tests.ranks import end_with_parent

end_with_parent()
for module in ("stagdist.training.pretrain", "stagdist.decode.engine", "torch._dynamo"):  # the last: any optimizer's
    importlib.import_module(module)
