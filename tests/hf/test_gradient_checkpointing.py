"""Gradient checkpointing computes activations again and changes no bit of losses and gradients."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from stagdist.hf.layers_stagformer import StagFormerCache
from tests.hf.models import DEEP, STAGGERED, build, generated, tokens
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")  # its new name is of 5.2x
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


def checkpointed(model: Any, reentrant: bool) -> Any:
    """The same model, with checkpointing."""
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def step(model: Any, padded: bool = True) -> dict[str, Tensor]:
    """Loss, and gradients by name, of a batch whose first row is padded."""
    ids, mask = tokens(3, 11), torch.ones(3, 11, dtype=torch.int64)
    mask[0, :4] = 0
    model.zero_grad()
    output = model(ids, labels=ids, attention_mask=mask if padded else None, use_cache=False)
    output.loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()} | {"loss": output.loss.detach()}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal bit by bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not found[name].equal(expected[name])]


DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)]


@REENTRANT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", STAGGERED + list(DEEP))
def test_losses_and_gradients_are_equal(variant: str, dtype: torch.dtype, reentrant: bool) -> None:
    model = build(variant, dtype)[0].train()
    expected = [step(model, padded) for padded in (True, False)]
    checkpointed(model, reentrant)
    found = [step(model, padded) for padded in (True, False)]
    assert [differing(*pair) for pair in zip(found, expected, strict=True)] == [[], []]
    model.gradient_checkpointing_disable()
    assert differing(step(model), expected[0]) == []


@REENTRANT
@pytest.mark.parametrize("variant", DEEP)
def test_every_layer_is_computed_a_second_time(variant: str, reentrant: bool) -> None:
    model = build(variant)[0].train()
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".down_proj")):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    step(model)
    plain = dict(calls)
    assert len(plain) == sum(name.endswith(("o_proj.weight", "down_proj.weight")) for name in model.state_dict())
    calls.clear()
    step(checkpointed(model, reentrant))
    assert calls == {name: 2 * count for name, count in plain.items()}


@REENTRANT
@pytest.mark.parametrize("variant", DEEP)
def test_what_the_backward_pass_keeps_is_a_fraction(variant: str, reentrant: bool) -> None:
    model = build(variant)[0].train()
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def activations() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(tokens(4, 16), use_cache=False)
        return sum(kept.values()) - output.logits.nbytes

    plain = activations()
    checkpointed(model, reentrant)
    assert activations() < plain / 3


def test_a_model_in_evaluation_keeps_its_cache() -> None:
    model = checkpointed(build("deep")[0], False)
    assert model(tokens(1, 4)).past_key_values.get_seq_length() == 4


def test_training_with_a_cache_is_off_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = checkpointed(build("deep")[0].train(), False)
    with caplog.at_level("WARNING"):
        for cache in (None, StagFormerCache()):
            assert model(tokens(1, 4), past_key_values=cache, use_cache=True).past_key_values is None
    assert caplog.text.count("`use_cache=True` is incompatible with gradient checkpointing") <= 1  # once per process
    filled = build("deep")[0](tokens(1, 4)).past_key_values
    with pytest.raises(ValueError, match=r"cannot use a filled cache; give all tokens, or call eval\(\)"):
        model(tokens(1, 4), past_key_values=filled)


@REENTRANT
@pytest.mark.parametrize("variant", DEEP)
def test_text_that_is_generated_in_training_mode_is_the_same(variant: str, reentrant: bool) -> None:
    model = build(variant)[0]
    expected = generated(model, tokens(2, 5))
    assert generated(checkpointed(model.train(), reentrant), tokens(2, 5)).equal(expected)


def trained(model: Any, folder: Any, **options: Any) -> dict[str, Tensor]:
    """Losses and weights after three steps of the Trainer."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 10)]
    settings: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "report_to": [], "use_cpu": True}
    settings |= {"per_device_train_batch_size": 2, "learning_rate": 0.01, "save_strategy": "no", "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(str(folder), **settings | options), train_dataset=rows)
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses) == 3
    return {name: value.detach().clone() for name, value in model.named_parameters()} | {"losses": losses}


@REENTRANT
@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("variant", ["tied", "stagger 0", "three sections with everything", *DEEP])
def test_the_trainer_learns_the_same_weights(variant: str, adapted: bool, reentrant: bool, tmp_path: Any) -> None:
    pytest.importorskip("accelerate", reason="needs the extra `eval`")

    def model() -> Any:
        torch.manual_seed(0)
        if not adapted:
            return build(variant)[0]
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(build(variant)[0], lora)

    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert differing(trained(model(), tmp_path, **options), trained(model(), tmp_path)) == []


def differences_in_two_processes(_: None) -> dict[tuple[str, bool], list[str] | str]:
    """Gradients that DDP does not average as one process does, or the error, by variant and `use_reentrant`."""
    dist.init_process_group("gloo")
    batches = [tokens(2, 9, seed=rank) for rank in range(2)]
    found: dict[tuple[str, bool], list[str] | str] = {}
    for variant in ("tied", *DEEP):
        for reentrant in (False, True):
            model = build(variant)[0].train()
            for ids in batches:
                (model(ids, labels=ids, use_cache=False).loss / 2).backward()
            expected = {name: value.grad for name, value in model.named_parameters()}
            model.zero_grad()
            ids, parallel = batches[dist.get_rank()], DistributedDataParallel(checkpointed(model, reentrant))
            try:
                parallel(ids, labels=ids, use_cache=False).loss.backward()
                gradients = {name: value.grad for name, value in model.named_parameters()}
                found[variant, reentrant] = differing(gradients, expected)
            except ValueError as error:
                found[variant, reentrant] = str(error)
    dist.destroy_process_group()
    return found


def test_two_processes_average_the_gradients_or_refuse() -> None:
    message = "share_section_weights in several processes: checkpointing needs use_reentrant False"
    for found in run_ranks("tests.hf.test_gradient_checkpointing:differences_in_two_processes", 2):
        assert found.pop(("deep, shared, combined", True)) == message
        assert len(found) == 5 and not any(found.values()), found
