"""Real distillations from the command line: `python -m kdkernels.train --help`."""

import os

from kdkernels.methods import Deployable, load_deployable


def load(path: str | os.PathLike[str]) -> Deployable:
    """The module that a run shipped (student.safetensors), ready to use: images in, logits out.

    Raises ValueError for a file that is not there, is damaged, or does not name its network.
    """
    from kdkernels.methods.deployable import read_about
    from kdkernels.train import models

    about = read_about(path)
    if "model" not in about:
        raise ValueError(f"{path} does not name its network: kdkernels.methods.load_deployable takes one")
    network = models.build(about["model"], about["classes"], about["channels"], about["image_size"])
    return load_deployable(path, network)
