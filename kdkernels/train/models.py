"""Each data set's own teacher and student; zoo.py has all networks by name.

               teacher                               student
fashion-mnist  cnn-16-32-64, 70 k parameters         cnn-8-16-32, 6.3 k parameters
digits         mlp-256-256, 85 k parameters          mlp-16, 1.2 k parameters
others         resnet32x4, 7.4 M parameters          resnet8x4, 1.2 M parameters
"""

from torch import nn

from kdkernels.train.data import SHAPES
from kdkernels.train.zoo import NAMES, GlobalAverage, NetworkError, build

__all__ = ["NAMES", "PAIRS", "GlobalAverage", "NetworkError", "build", "student", "teacher"]

# data set: (teacher, student)
PAIRS = {
    "fashion-mnist": ("cnn-16-32-64", "cnn-8-16-32"),
    "digits": ("mlp-256-256", "mlp-16"),
    "cifar10": ("resnet32x4", "resnet8x4"),
    "cifar100": ("resnet32x4", "resnet8x4"),
    "folder": ("resnet32x4", "resnet8x4"),
}


def teacher(data: str) -> nn.Module:
    """The untrained teacher of a data set whose shape its name tells: all but folder."""
    return build(PAIRS[data][0], *SHAPES[data])


def student(data: str) -> nn.Module:
    """The untrained student of a data set whose shape its name tells: all but folder."""
    return build(PAIRS[data][1], *SHAPES[data])
