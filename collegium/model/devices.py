"""Find the torch device that a setting names, and say why it cannot be used."""

import torch

from collegium.model.allocation import first_line


class DeviceError(ValueError):
    """A device that does not exist, or that this build of torch does not know. remedy: what to do instead."""

    def __init__(self, what: str, remedy: str = "use cpu or cuda:N") -> None:
        super().__init__(what)
        self.remedy = remedy


def find_device(name: str) -> torch.device:
    """Find a device, and put one number on it to see that it works. Raises DeviceError."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.backends.cuda.is_built():
            raise DeviceError(
                f"{name} cannot be used: the installed torch {torch.__version__} is a build without CUDA",
                "install a build of torch for CUDA, or use cpu",
            )
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch, of a device that is not there
        raise DeviceError(first_line(error)) from error
    return device
