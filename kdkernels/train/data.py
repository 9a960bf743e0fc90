"""Fashion-MNIST, digits, CIFAR-10, CIFAR-100 and folders of images: find the files, check them, split them.

Fashion-MNIST comes from --data-dir, from Debian's package, or from its official source; CIFAR from --data-dir,
as unpacked or as packed, or from its official source. A download's published MD5 must match before the file
gets its name. The test images are nobody's choice: a data set always has the same ones, and nothing here looks
at their labels.
"""

import gzip
import hashlib
import http.client
import io
import math
import os
import pickle
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("fashion-mnist", "digits", "cifar10", "cifar100", "folder")
CLASSES = 10  # of Fashion-MNIST and digits
# data set: (classes, channels, image size); a folder's are its own
SHAPES = {
    "fashion-mnist": (CLASSES, 1, 28),
    "digits": (CLASSES, 1, 8),
    "cifar10": (10, 3, 32),
    "cifar100": (100, 3, 32),
}

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

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# All images of a folder are held in memory, a byte a channel.
FOLDER_LIMIT = 4 * 2**30


@dataclass(frozen=True)
class Cifar:
    """What tells CIFAR-10 and CIFAR-100 apart."""

    title: str
    classes: int
    labels: str  # the key of the labels
    folder: str  # as unpacked
    train: tuple[str, ...]
    test: tuple[str, ...]
    archive: str
    md5: str  # as published beside the archive
    mean: tuple[float, float, float]  # of the training images, in units of 255
    std: tuple[float, float, float]


CIFAR = {
    "cifar10": Cifar(
        title="CIFAR-10",
        classes=10,
        labels="labels",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Cifar(
        title="CIFAR-100",
        classes=100,
        labels="fine_labels",
        folder="cifar-100-python",
        train=("train",),
        test=("test",),
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    ),
}


class DataError(Exception):
    """The data is missing or damaged; the message is one line for the user."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels, and how many training images are kept for validation.

    Large sets hold their images as bytes. `batch` and `normalise` give what a network takes, whichever they are.
    """

    train_images: Tensor  # (n, C, H, W), float32 as a network takes them, or uint8
    train_labels: Tensor  # (n,), int64
    test_images: Tensor
    test_labels: Tensor
    validation_size: int
    classes: int = CLASSES
    mean: Tensor | None = None  # (C, 1, 1) of uint8 images, in units of 255
    std: Tensor | None = None
    augmented: bool = False  # whether training batches are cropped and flipped at random

    def to(self, device: torch.device) -> "Dataset":
        """The same data on a device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def normalise(self, images: Tensor) -> Tensor:
        """Some of the images as a network takes them, float32."""
        if self.mean is None or self.std is None:
            return images
        return (images / 255 - self.mean) / self.std

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Training images as a network takes them; augmented if the set is and there is a generator."""
        images = self.train_images[indices]
        if self.augmented and generator is not None:
            images = augment(images, generator, padding=self.image_size // 8)
        return self.normalise(images)

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train_images.shape[-1]

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


def load(
    name: str,
    data_dir: Path | None = None,
    notify: Callable[[str], None] = print,
    image_size: int = 32,
) -> Dataset:
    """Load a data set by its name in NAMES. `notify` hears about downloads; `image_size` is a folder's."""
    if name == "digits":
        return _digits()
    if name == "folder":
        return _folder(data_dir, image_size, notify)
    if name in CIFAR:
        return _cifar(CIFAR[name], data_dir, notify)
    return _fashion_mnist(_find_fashion_mnist(data_dir, notify))


def augment(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each of (M, C, H, W) images moved by up to `padding` pixels, zeros moving in, and flipped or not.

    Drawn on the generator's device, so that a CPU's seed means the same on every device.
    """
    m, _, h, w = images.shape
    device = generator.device
    shift = torch.randint(0, 2 * padding + 1, (2, m, 1), generator=generator, device=device)
    flip = torch.randint(0, 2, (1, m, 1), generator=generator, device=device)
    down, right, flip = torch.cat([shift, flip]).to(images.device)  # one copy to the device
    rows = down + torch.arange(h, device=images.device)  # (M, H)
    columns = torch.arange(w, device=images.device)
    columns = right + torch.where(flip == 1, columns.flip(0), columns)  # (M, W)
    padded = F.pad(images, (padding,) * 4)
    image = torch.arange(m, device=images.device)[:, None, None]
    # (M, H, W, C): as channels_last as the networks like it.
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def split(labels: Tensor, validation_size: int, labelled_size: int, seed: int) -> Split:
    """Draw the validation images, then the labelled ones, as evenly over the classes as can be."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    validation, rest = order[:validation_size], order[validation_size:]
    rank = torch.empty_like(rest)  # the how-many-th image of its class each one is, in the random order
    for c in labels.unique():
        mine = labels[rest] == c
        rank[mine] = torch.arange(int(mine.sum()))
    rest = rest[rank.argsort(stable=True)]
    pool = rest[labelled_size:]
    # Sorted by rank, the pool's last images would all be of the largest class: shuffle it.
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    return Split(validation, rest[:labelled_size], pool)


def cache_folder(name: str = "fashion-mnist") -> Path:
    """Where a download is kept: $XDG_CACHE_HOME/kdkernels/NAME, by default below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kdkernels" / name


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16.0, dtype=torch.float32)
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


def _cifar(cifar: Cifar, data_dir: Path | None, notify: Callable[[str], None]) -> Dataset:
    read = _find_cifar(cifar, data_dir, notify)
    images, labels = [], []
    for names in (cifar.train, cifar.test):
        parts = [read_cifar(cifar, *read(name)) for name in names]
        images.append(torch.cat([part[0] for part in parts]))
        labels.append(torch.cat([part[1] for part in parts]))
    mean, std = (torch.tensor(x)[:, None, None] for x in (cifar.mean, cifar.std))
    validation_size = len(labels[0]) // 10
    return Dataset(
        images[0], labels[0], images[1], labels[1], validation_size, cifar.classes, mean, std, augmented=True
    )


def _find_cifar(
    cifar: Cifar, data_dir: Path | None, notify: Callable[[str], None]
) -> Callable[[str], tuple[str, bytes]]:
    """What reads one of the batches by its name: gives where it is, for errors, and its bytes."""
    names = (*cifar.train, *cifar.test)
    folder = data_dir or cache_folder(cifar.title.lower())
    for place in (folder, folder / cifar.folder):
        missing = [name for name in names if not (place / name).is_file()]
        if not missing:
            return lambda name: (str(place / name), _read(place / name))
        if len(missing) < len(names):
            raise DataError(f"{cifar.title} is not whole: {place} has no {', '.join(missing)}")
    archive = folder / cifar.archive
    if not archive.is_file():
        ways = (
            f"name the folder {cifar.folder}, or one that holds it or {cifar.archive}, with --data-dir; "
            f"or let it download from {CIFAR_URL}"
        )
        if data_dir is not None:
            what = f"--data-dir {data_dir} has neither {cifar.folder} nor {cifar.archive}"
            raise DataError(f"{cifar.title} not found: {what}; {ways}")
        try:
            _download(CIFAR_URL + cifar.archive, archive, cifar.md5, notify)
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{cifar.title} not found: the download failed ({error}); {ways}") from None
    batches = _read_archive(archive, [f"{cifar.folder}/{name}" for name in names])
    return lambda name: (f"{archive}: {cifar.folder}/{name}", batches[f"{cifar.folder}/{name}"])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_archive(path: Path, names: list[str]) -> dict[str, bytes]:
    """The named files of a tar.gz, read in the order they are packed in; nothing is unpacked to the disk."""
    found = {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name in names else None
                if file is not None:
                    found[member.name] = file.read()
            while stream.read(1 << 20):  # to its end, where gzip's checksum is
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path}: not a whole tar.gz file ({error})") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{path}: holds no {', '.join(missing)}")
    return found


def read_cifar(cifar: Cifar, where: str, content: bytes) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) and labels (n,) of one batch file's content; `where` names it in errors."""
    try:
        batch = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: not a whole pickle, as {cifar.title}'s files are ({reason})") from None
    if not isinstance(batch, dict):
        raise DataError(f"{where}: holds a {type(batch).__name__}, {cifar.title}'s files hold a dict")
    batch = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    if not {"data", cifar.labels} <= set(batch):
        keys = ", ".join(repr(key) for key in batch if isinstance(key, str))[:200] or "nothing"
        raise DataError(f"{where}: holds {keys}; {cifar.title}'s files hold data and {cifar.labels}")
    data, labels = batch["data"], batch[cifar.labels]
    if not isinstance(data, _PickledArray):
        raise DataError(f"{where}: its data is a {type(data).__name__}, {cifar.title}'s is an array")
    if data.dtype != "u1" or len(data.shape) != 2 or data.shape[1] != 3072 or not data.shape[0]:
        sizes = "×".join(map(str, data.shape))
        raise DataError(f"{where}: its data is {sizes} of {data.dtype!r}, {cifar.title}'s is n×3072 of 'u1'")
    if len(data.content) != math.prod(data.shape):
        promised = f"{data.shape[0]}×3072 = {math.prod(data.shape)}"
        raise DataError(f"{where}: promises {promised} bytes of data, it holds {len(data.content)}")
    if not isinstance(labels, list):
        raise DataError(f"{where}: its labels are a {type(labels).__name__}, {cifar.title}'s are a list")
    if len(labels) != data.shape[0]:
        raise DataError(f"{where}: {len(labels)} labels for {data.shape[0]} images")
    for label in labels:
        if type(label) is not int or not 0 <= label < cifar.classes:
            shown = label if type(label) is int and label.bit_length() < 64 else f"a {type(label).__name__}"
            raise DataError(f"{where}: holds the label {shown}, not from 0 to {cifar.classes - 1}")
    images = torch.frombuffer(bytearray(data.content), dtype=torch.uint8).view(-1, 3, 32, 32)
    return images, torch.tensor(labels, dtype=torch.int64)


class _PickledType:
    """Stands for numpy's dtype in a pickle: its name is enough."""

    name = ""

    def __init__(self, name: Any = b"", *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else str(name)

    def __setstate__(self, _: Any) -> None:
        pass


class _PickledArray:
    """Stands for numpy's array in a pickle: shape, type and bytes, checked by who reads them."""

    shape: tuple[int, ...] = ()
    dtype = ""
    content = b""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if fortran or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
            raise ValueError("an array of another order or shape")
        if not isinstance(dtype, _PickledType) or not isinstance(content, bytes):
            raise ValueError("an array of objects")
        self.shape, self.dtype, self.content = tuple(shape), dtype.name, content


class _CifarUnpickler(pickle.Unpickler):
    """Numbers, strings, lists, dicts and arrays. No foreign code runs, not even numpy's.

    A pickle names what it wants called: here the names of numpy's arrays stand for the classes above, and no
    other name stands for anything.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _PickledArray
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _PickledArray if name == "ndarray" else _PickledType
        asked = f"{module}.{name}"[:80]
        raise DataError(f"its pickle asks for {asked!r}, CIFAR's ask for numpy's arrays alone")


def _folder(data_dir: Path | None, image_size: int, notify: Callable[[str], None]) -> Dataset:
    """X/train/CLASS/*.png and X/test/CLASS/*.png, or X/val where there is no X/test."""
    if data_dir is None:
        raise DataError("--data folder needs --data-dir X, with images in X/train/CLASS and X/test/CLASS")
    train, test = data_dir / "train", data_dir / "test"
    if not test.is_dir():
        test = data_dir / "val"
    for folder in (train, test):
        if not folder.is_dir():
            what = "train" if folder == train else "test and no val"
            raise DataError(
                f"{data_dir} has no {what}: takes images in train/CLASS and in test/CLASS or val/CLASS"
            )
    classes = _classes(train)
    if len(classes) < 2:
        raise DataError(f"{train} has {len(classes)} folders, takes 2 or more: one per class")
    for one, other in ((test, train), (train, test)):
        lacking = sorted(set(_classes(other)) - set(_classes(one)))
        if lacking:
            raise DataError(f"{one} has no folder {lacking[0]!r}, a class of {other}")
    files = [
        [(path, c) for c, name in enumerate(classes) for path in _images(part / name)]
        for part in (train, test)
    ]
    count = sum(map(len, files))
    size = 3 * image_size**2
    if count * size > FOLDER_LIMIT:
        raise DataError(
            f"{data_dir}: {count:,} images of 3×{image_size}×{image_size} need {count * size / 2**30:.1f} GiB "
            f"of memory, takes at most {FOLDER_LIMIT / 2**30:.1f}: a smaller image size or fewer images"
        )
    notify(f"Reading {count:,} images of {len(classes)} classes from {data_dir}")
    images = [_read_images([path for path, _ in part], image_size) for part in files]
    labels = [torch.tensor([c for _, c in part]) for part in files]
    # ImageNet's: the usual ones where nothing is known of the images.
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    validation_size = min(5000, max(1, len(labels[0]) // 10))
    return Dataset(
        images[0], labels[0], images[1], labels[1], validation_size, len(classes), mean, std, augmented=True
    )


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."
    )
    if not paths:
        raise DataError(f"{folder} has no image: takes {', '.join(IMAGE_SUFFIXES)}")
    return paths


def _read_images(paths: list[Path], size: int) -> Tensor:
    """(n, 3, size, size) of bytes: the short side becomes `size`, the long one is cut on both ends."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise DataError("--data folder needs Pillow: pip install 'kdkernels[train]'") from None
    images = torch.empty((len(paths), 3, size, size), dtype=torch.uint8)
    for image, path in zip(images, paths):
        try:
            with Image.open(path) as file:
                whole = ImageOps.fit(file.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)
            reason = (
                "not an image that Pillow knows" if unknown else getattr(error, "strerror", None) or error
            )
            raise DataError(f"{path}: cannot be read ({reason})") from None
        image.copy_(torch.from_numpy(np.array(whole)).permute(2, 0, 1))
    return images


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
