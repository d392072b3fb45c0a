"""The device of a rank: every choice, its refusals, and what is set before CUDA starts."""

import os

import pytest
import torch

from benchmarks.common.conditions import device_of_ranks
from stagdist.errors import ConfigError
from stagdist.parallel.device import choose_attention
from stagdist.parallel.groups import single_process
from stagdist.parallel.world import choose_device, join_world


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(
    ("choice", "local_rank", "device"),
    [("auto", 1, "cuda:1"), ("cuda", 0, "cuda:0"), ("cuda:0", 1, "cuda:0"), ("cuda:1", 7, "cuda:1"), ("cpu", 1, "cpu")],
)
@pytest.mark.usefixtures("gpus")
def test_every_choice_names_one_device(choice: str, local_rank: int, device: str) -> None:
    assert choose_device(choice, local_rank) == device


@pytest.mark.parametrize(
    ("choice", "local_rank", "complaint"),
    [
        ("cuda:2", 0, "sees 2 CUDA devices, cuda:0 to cuda:1"),
        ("auto", 2, "local rank 2 has no device of its own, torch sees 2"),
        ("gpu", 0, "--device is 'gpu'; give auto, cpu, cuda or cuda:N"),
        ("cuda:", 0, "--device is 'cuda:'"),
    ],
)
@pytest.mark.usefixtures("gpus")
def test_a_device_that_is_not_there_is_refused(choice: str, local_rank: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        choose_device(choice, local_rank)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_means_the_cpu_and_cuda_is_refused() -> None:
    assert choose_device("auto") == "cpu"
    for choice in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"parallel.device is {choice}, but torch sees no CUDA device"):
            choose_device(choice, option="parallel.device")


@pytest.mark.usefixtures("gpus")
def test_hardware_queues_are_set_before_cuda_starts_unless_the_user_has_set_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose_device("auto")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    choose_device("auto")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


@pytest.mark.usefixtures("gpus")
def test_ranks_on_gpus_refuse_one_hardware_queue_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    two = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with pytest.raises(ConfigError, match="CUDA_DEVICE_MAX_CONNECTIONS is 1 .* ranks would deadlock. Unset it"):
        join_world(choose_device("auto"), 1.0, environment=two)


@pytest.mark.parametrize(("device", "calls"), [("cuda:1", ["cuda:1", "nccl"]), ("cpu", ["gloo"])])
def test_a_world_of_one_rank_uses_the_backend_of_its_device(
    monkeypatch: pytest.MonkeyPatch, device: str, calls: list[str]
) -> None:
    made: list[str] = []

    def init(backend: str, **keys: object) -> None:
        made.append(backend)
        raise LookupError

    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(LookupError), single_process(device=device):
        pass
    assert made == calls


@pytest.mark.parametrize(
    ("choice", "device"), [("auto", ("cuda", 2, "H100")), ("cuda:1", ("cuda:1", 1, "H100")), ("cpu", ("cpu", 0, None))]
)
@pytest.mark.usefixtures("gpus")
def test_benchmarks_spread_their_ranks_over_the_gpus_that_were_chosen(
    monkeypatch: pytest.MonkeyPatch, choice: str, device: tuple[str, int, str | None]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    assert device_of_ranks(choice) == device


def test_cudnn_attention_is_for_training_alone() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        choose_attention(training=False)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
        choose_attention(training=True)
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
