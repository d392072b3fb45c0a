"""How a device is named on command lines and in `parallel.device`."""

import re

DEVICE_CHOICES = "auto, cpu, cuda or cuda:N"


def device_problem(choice: str, option: str) -> str | None:
    """Why `choice` does not name a device; None if it does.

    Args:
        option: name of the option or configuration key.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", choice):
        return None
    return f"{option} is {choice!r}; give {DEVICE_CHOICES}"
