"""Fashion-MNIST and digits: find the files, check them, split the training images.

Fashion-MNIST comes from --data-dir, from Debian's package, or from its official source, where each file's
published MD5 must match before the file gets its name. The test images are nobody's choice: both data sets
always have the same ones, and nothing here looks at their labels.
"""

import gzip
import hashlib
import http.client
import math
import os
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NAMES = ("fashion-mnist", "digits")
CLASSES = 10

OFFICIAL_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# MD5 of the official files, as published in the README of github.com/zalandoresearch/fashion-mnist. Debian's
# copies hold the same bytes under another gzip header, so this is asked of downloads only.
OFFICIAL_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


class DataError(Exception):
    """The data is missing or damaged; the message is one line for the user."""


@dataclass(frozen=True)
class Dataset:
    """Images as float32, labels as int64, and how many training images are kept for validation."""

    train_images: Tensor  # (n, 1, 28, 28) or (n, 64)
    train_labels: Tensor  # (n,)
    test_images: Tensor
    test_labels: Tensor
    validation_size: int

    def to(self, device: torch.device) -> "Dataset":
        """The same data on a device."""
        return Dataset(
            self.train_images.to(device),
            self.train_labels.to(device),
            self.test_images.to(device),
            self.test_labels.to(device),
            self.validation_size,
        )

    @property
    def trainable(self) -> int:
        """Training images that are left when validation has its share: what --labels may ask for."""
        return len(self.train_labels) - self.validation_size


@dataclass(frozen=True)
class Split:
    """Disjoint indices into the training images."""

    validation: Tensor
    labelled: Tensor
    pool: Tensor


def load(name: str, data_dir: Path | None = None, notify: Callable[[str], None] = print) -> Dataset:
    """Load a data set by its name in NAMES. `notify` hears about downloads."""
    return _digits() if name == "digits" else _fashion_mnist(_find_fashion_mnist(data_dir, notify))


def split(labels: Tensor, validation_size: int, labelled_size: int, seed: int) -> Split:
    """Draw the validation images, then the labelled ones, as evenly over the classes as can be."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    validation, rest = order[:validation_size], order[validation_size:]
    rank = torch.empty_like(rest)  # the how-many-th image of its class each one is, in the random order
    for c in range(CLASSES):
        mine = labels[rest] == c
        rank[mine] = torch.arange(int(mine.sum()))
    rest = rest[rank.argsort(stable=True)]
    pool = rest[labelled_size:]
    # Sorted by rank, the pool's last images would all be of the largest class: shuffle it.
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    return Split(validation, rest[:labelled_size], pool)


def cache_folder() -> Path:
    """Where a download is kept: $XDG_CACHE_HOME/kdkernels/fashion-mnist, by default below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kdkernels" / "fashion-mnist"


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    # The set has no official test part. A constant seed makes one, the same whatever --seed is.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return Dataset(images[train], labels[train], images[test], labels[test], validation_size=237)


def _fashion_mnist(folder: Path) -> Dataset:
    images, labels = [], []
    for part in ("train", "t10k"):
        image_file = folder / f"{part}-images-idx3-ubyte.gz"
        label_file = folder / f"{part}-labels-idx1-ubyte.gz"
        pixels, classes = read_idx(image_file, 3), read_idx(label_file, 1)
        if pixels.shape[1:] != (28, 28):
            height, width = pixels.shape[1:]
            raise DataError(f"{image_file}: holds images of {height}×{width}, Fashion-MNIST's are 28×28")
        if len(pixels) != len(classes):
            raise DataError(
                f"{label_file}: {len(classes)} labels for {len(pixels)} images in {image_file.name}"
            )
        if classes.max(initial=0) >= CLASSES:
            raise DataError(f"{label_file}: holds the label {classes.max()}, above {CLASSES - 1}")
        # The training images' mean and standard deviation, in units of 255.
        images.append((torch.tensor(pixels)[:, None] / 255 - 0.286) / 0.353)
        labels.append(torch.tensor(classes, dtype=torch.int64))
    # 2,000 of 60,000: an epoch's validation stays short beside the few hundred images it follows.
    validation_size = min(2000, len(labels[0]) // 10)
    return Dataset(images[0], labels[0], images[1], labels[1], validation_size)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read one idx.gz file of unsigned bytes and check all that its header promises."""
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except EOFError:
        size = path.stat().st_size
        raise DataError(f"{path}: truncated, the compressed data stops after {size} bytes") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    header_size = 4 + 4 * dimensions
    expected_magic = 0x0800 + dimensions  # 08: unsigned bytes
    magic = int.from_bytes(raw[:4], "big")
    if magic != expected_magic:
        raise DataError(f"{path}: its magic number is {magic}, an idx{dimensions} file's is {expected_magic}")
    if len(raw) < header_size:
        raise DataError(f"{path}: truncated within its header ({len(raw)} bytes)")
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, header_size, 4)]
    promised, held = math.prod(shape), len(raw) - header_size
    if promised != held or not held:
        sizes = "×".join(map(str, shape))
        raise DataError(f"{path}: its header promises {sizes} = {promised} bytes of data, it holds {held}")
    return np.frombuffer(raw, np.uint8, offset=header_size).reshape(shape)


def _find_fashion_mnist(data_dir: Path | None, notify: Callable[[str], None]) -> Path:
    ways = (
        "three ways to get it: install Debian's package (apt install dataset-fashion-mnist); "
        f"or name a folder with the four idx.gz files ({', '.join(OFFICIAL_MD5)}) with --data-dir; "
        f"or let it download from {OFFICIAL_URL}. Without any: --data digits"
    )
    if data_dir is not None:  # a folder that was named is obeyed: another copy must not stand in silently
        missing = [name for name in OFFICIAL_MD5 if not (data_dir / name).exists()]
        if missing:
            what = f"--data-dir {data_dir} has no {', '.join(missing)}"
            raise DataError(f"Fashion-MNIST not found: {what}; {ways}")
        return data_dir
    for folder in (DEBIAN_FOLDER, cache_folder()):
        if all((folder / name).exists() for name in OFFICIAL_MD5):
            return folder
    try:
        for name, md5 in OFFICIAL_MD5.items():
            _download(OFFICIAL_URL + name, cache_folder() / name, md5, notify)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"Fashion-MNIST not found: the download failed ({error}); {ways}") from None
    return cache_folder()


def _download(url: str, path: Path, md5: str, notify: Callable[[str], None]) -> None:
    if path.exists():
        return
    notify(f"Downloading {url} to {path.parent}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=30) as source, open(temporary, "wb") as target:
            while chunk := source.read(1 << 16):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != md5:
            raise DataError(f"{url}: MD5 {digest.hexdigest()}, published is {md5}; the download was not kept")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
