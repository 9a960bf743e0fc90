"""The data sets of the driver in the formats of their sources, and what is said of damaged files."""

import gzip
import hashlib
import http.server
import os
import pickle
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

for library in ("PIL", "sklearn"):
    pytest.importorskip(library, reason="kdkernels[train] is not installed")

from PIL import Image  # noqa: E402

from kdkernels.train import data  # noqa: E402

# CIFAR's files: pickles as Python 2 wrote them


def text(content: bytes) -> bytes:
    short = len(content) < 256
    return (b"U" + bytes([len(content)]) if short else b"T" + struct.pack("<I", len(content))) + content


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def items(parts: list[bytes]) -> bytes:
    return b"](" + b"".join(parts) + b"e"


def array(shape: tuple[int, int], content: bytes, dtype: bytes = b"u1") -> bytes:
    empty = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + number(0)
        + b"\x85"
        + text(b"b")
        + b"\x87R"
    )
    kind = b"cnumpy\ndtype\n" + text(dtype) + number(0) + number(1) + b"\x87R"
    kind += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    sizes = number(shape[0]) + number(shape[1]) + b"\x86"
    return empty + b"(" + number(1) + sizes + kind + b"\x89" + text(content) + b"tb"


def batch(values: dict[bytes, bytes]) -> bytes:
    """A dict of keys and pickled values."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u."


def cifar_batch(key: bytes, labels: list[int], seed: int = 0) -> bytes:
    content = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), np.uint8).tobytes()
    return batch(
        {
            b"batch_label": text(b"a batch"),
            key: items([number(label) for label in labels]),
            b"data": array((len(labels), 3072), content),
            b"filenames": items([text(b"image.png")] * len(labels)),
        }
    )


def write_cifar(parent: Path, name: str) -> Path:
    """A whole small data set as unpacked: 20 images in each file."""
    cifar = data.CIFAR[name]
    folder = parent / cifar.folder
    folder.mkdir(parents=True)
    for seed, file in enumerate((*cifar.train, *cifar.test)):
        labels = [(7 * i + seed) % cifar.classes for i in range(20)]
        (folder / file).write_bytes(cifar_batch(cifar.labels.encode(), labels, seed))
    (folder / "batches.meta").write_bytes(b"not read")
    return folder


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def error_of(*arguments, **options) -> str:
    """What load says of data it refuses: one line."""
    with pytest.raises(data.DataError) as caught:
        data.load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: data.Dataset, other: data.Dataset) -> bool:
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    return all(torch.equal(getattr(one, key), getattr(other, key)) for key in keys)


@pytest.mark.parametrize("name", data.CIFAR)
def test_cifar_as_unpacked_and_as_packed(name, tmp_path):
    cifar = data.CIFAR[name]
    folder = write_cifar(tmp_path, name)
    loaded = data.load(name, folder)
    n = 20 * len(cifar.train)
    assert loaded.train_images.shape == (n, 3, 32, 32)
    assert loaded.test_images.shape == (20, 3, 32, 32)
    assert loaded.train_images.dtype == torch.uint8
    assert (loaded.classes, loaded.channels, loaded.image_size) == data.SHAPES[name]
    assert loaded.validation_size == n // 10
    assert loaded.augmented
    assert loaded.train_labels[:4].tolist() == [7 * i % cifar.classes for i in range(4)]
    # A row is a whole red image, then green, then blue.
    with open(folder / cifar.test[0], "rb") as file:
        pickled = pickle.load(file, encoding="bytes")  # as the source's own page reads it
    rows = torch.tensor(pickled[b"data"])
    assert torch.equal(loaded.test_images[:, 1], rows[:, 1024:2048].view(-1, 32, 32))
    assert loaded.test_labels.tolist() == pickled[cifar.labels.encode()]

    assert same(data.load(name, tmp_path), loaded)
    packed = tmp_path / "packed"
    packed.mkdir()
    pack(folder, packed / cifar.archive)
    assert same(data.load(name, packed), loaded)
    assert list(packed.iterdir()) == [packed / cifar.archive]  # nothing was unpacked beside it


def test_cifar_pickled_by_a_new_python(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (3, 3072), np.uint8)
    for protocol in (3, 4):
        content = pickle.dumps({b"data": rows, b"labels": [1, 2, 9]}, protocol=protocol)
        images, labels = data.read_cifar(data.CIFAR["cifar10"], "a file", content)
        assert torch.equal(images.view(3, -1), torch.tensor(rows))
        assert labels.tolist() == [1, 2, 9]


def damage_truncate(content: bytes) -> tuple[bytes, str]:
    return content[:-500], "not a whole pickle"


def damage_empty(content: bytes) -> tuple[bytes, str]:
    return b"", "not a whole pickle"


def damage_page(content: bytes) -> tuple[bytes, str]:
    return b"<html>not found</html>\n", "not a whole pickle"


def damage_fewer_labels(content: bytes) -> tuple[bytes, str]:
    rows = array((3, 3072), bytes(3 * 3072))
    return batch({b"data": rows, b"labels": items([number(1)] * 2)}), "2 labels for 3 images"


def damage_labels_of_another_kind(content: bytes) -> tuple[bytes, str]:
    rows = array((1, 3072), bytes(3072))
    return batch({b"data": rows, b"labels": text(b"1")}), "its labels are a bytes, CIFAR-10's are a list"


def damage_class(content: bytes) -> tuple[bytes, str]:
    return cifar_batch(b"labels", [3, 10]), "holds the label 10, not from 0 to 9"


def damage_negative_class(content: bytes) -> tuple[bytes, str]:
    return cifar_batch(b"labels", [3, -1]), "holds the label -1, not from 0 to 9"


def damage_class_of_another_kind(content: bytes) -> tuple[bytes, str]:
    rows = array((1, 3072), bytes(3072))
    return batch({b"data": rows, b"labels": items([text(b"cat")])}), "holds the label a bytes"


def damage_huge_class(content: bytes) -> tuple[bytes, str]:
    huge = b"\x8b" + struct.pack("<i", 4000) + bytes(3999) + b"\1"
    rows = array((1, 3072), bytes(3072))
    return batch({b"data": rows, b"labels": items([huge])}), "holds the label a int"


def damage_keys(content: bytes) -> tuple[bytes, str]:
    return batch(
        {b"images": number(1), b"tags": number(2)}
    ), "holds 'images', 'tags'; CIFAR-10's files hold data and labels"


def damage_other_cifar(content: bytes) -> tuple[bytes, str]:
    return cifar_batch(b"fine_labels", [3]), "files hold data and labels"


def damage_shape(content: bytes) -> tuple[bytes, str]:
    return batch(
        {b"data": array((2, 784), bytes(1568)), b"labels": items([])}
    ), "2×784 of 'u1', CIFAR-10's is n×3072"


def damage_dtype(content: bytes) -> tuple[bytes, str]:
    return batch({b"data": array((1, 3072), bytes(12288), b"f4"), b"labels": items([])}), "1×3072 of 'f4'"


def damage_no_image(content: bytes) -> tuple[bytes, str]:
    return batch({b"data": array((0, 3072), b""), b"labels": items([])}), "0×3072"


def damage_short_array(content: bytes) -> tuple[bytes, str]:
    short = array((2, 3072), bytes(3072))
    return batch(
        {b"data": short, b"labels": items([number(1)] * 2)}
    ), "2×3072 = 6144 bytes of data, it holds 3072"


def damage_array_of_objects(content: bytes) -> tuple[bytes, str]:
    rows = array((1, 1), b"").replace(text(b""), items([number(1)]))
    return batch({b"data": rows, b"labels": items([])}), "an array of objects"


def damage_list_for_data(content: bytes) -> tuple[bytes, str]:
    return batch({b"data": items([]), b"labels": items([])}), "its data is a list"


def damage_no_dict(content: bytes) -> tuple[bytes, str]:
    return b"\x80\x02" + items([number(1)]) + b".", "holds a list, CIFAR-10's files hold a dict"


def damage_array_never_made(content: bytes) -> tuple[bytes, str]:
    made = b"cnumpy\nndarray\n)\x81"  # NEWOBJ: made without being set
    return batch({b"data": made, b"labels": items([])}), "its data is"


@pytest.mark.parametrize("damage", [v for k, v in sorted(globals().items()) if k.startswith("damage_")])
def test_a_damaged_batch_is_named(damage, tmp_path):
    path = write_cifar(tmp_path, "cifar10") / "data_batch_3"
    content, expected = damage(path.read_bytes())
    path.write_bytes(content)
    error = error_of("cifar10", tmp_path)
    assert error.startswith(f"{path}: ")
    assert expected in error


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", [os.mkdir, eval, np.load, print, np.zeros, getattr])
def test_a_hostile_pickle_is_refused(call, protocol, tmp_path):
    path = write_cifar(tmp_path, "cifar100") / "train"
    harm = tmp_path / "harm"
    argument = f"__import__('os').mkdir({str(harm)!r})" if call is eval else str(harm)
    path.write_bytes(pickle.dumps({"data": Hostile(call, argument), "fine_labels": [1]}, protocol))
    error = error_of("cifar100", tmp_path)
    assert error.startswith(f"{path}: its pickle asks for ")
    assert f".{call.__name__}'" in error
    assert not harm.exists()


def test_a_batch_that_is_missing_is_named(tmp_path):
    folder = write_cifar(tmp_path, "cifar10")
    (folder / "data_batch_4").unlink()
    (folder / "test_batch").unlink()
    for place in (folder, tmp_path):
        assert (
            error_of("cifar10", place) == f"CIFAR-10 is not whole: {folder} has no data_batch_4, test_batch"
        )


def test_a_folder_without_cifar_is_named(tmp_path):
    error = error_of("cifar100", tmp_path)
    for word in (str(tmp_path), "cifar-100-python", "cifar-100-python.tar.gz", "--data-dir", data.CIFAR_URL):
        assert word in error


def test_a_damaged_archive_is_named(tmp_path):
    archive = tmp_path / "cifar-100-python.tar.gz"
    pack(write_cifar(tmp_path / "unpacked", "cifar100"), archive)
    whole = archive.read_bytes()
    for content in (
        whole[:-3],
        whole[: len(whole) // 2],
        b"",
        b"<html>",
        whole[:-8] + b"12345678",
        gzip.compress(b"?"),
    ):
        archive.write_bytes(content)
        assert error_of("cifar100", tmp_path).startswith(f"{archive}: not a whole tar.gz file (")


def test_an_archive_of_something_else_is_named(tmp_path):
    archive = tmp_path / "cifar-100-python.tar.gz"
    folder = write_cifar(tmp_path / "unpacked", "cifar100")
    (folder / "train").unlink()
    (folder / "train").symlink_to("/etc/passwd")
    pack(folder, archive)
    assert str(archive) in error_of("cifar100", tmp_path)
    (folder / "train").unlink()
    pack(folder, archive)
    assert error_of("cifar100", tmp_path) == f"{archive}: holds no cifar-100-python/train"
    (folder / "train").write_bytes(b"")
    pack(folder, archive)
    error = error_of("cifar100", tmp_path)
    assert error.startswith(f"{archive}: cifar-100-python/train: not a whole pickle")


@pytest.fixture
def server(tmp_path):
    """The files of tmp_path/source on http://127.0.0.1."""
    source = tmp_path / "source"
    source.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(source))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield source, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_a_download_of_cifar_is_checked_and_kept(nowhere, server, monkeypatch):
    source, url = server
    cifar = data.CIFAR["cifar10"]
    folder = write_cifar(nowhere, "cifar10")
    pack(folder, source / cifar.archive)
    monkeypatch.setattr(data, "CIFAR_URL", url)
    heard: list[str] = []
    error = error_of("cifar10", None, heard.append)  # a made file under the real checksum
    assert cifar.archive in error
    assert "c58f30108f718f92721af3b95e74349a" in error
    assert list(data.cache_folder("cifar-10").iterdir()) == []

    md5 = hashlib.md5((source / cifar.archive).read_bytes()).hexdigest()
    monkeypatch.setitem(data.CIFAR, "cifar10", data.replace(cifar, md5=md5))
    downloaded = data.load("cifar10", None, heard.append)
    assert len(heard) == 2
    assert same(downloaded, data.load("cifar10", folder))
    monkeypatch.setattr(data, "CIFAR_URL", "http://127.0.0.1:1/")
    assert same(data.load("cifar10", None, heard.append), downloaded)  # from the cache
    assert len(heard) == 2


def test_a_download_that_fails_names_the_ways(nowhere, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_URL", (nowhere / "no-server").as_uri() + "/")
    error = error_of("cifar100", None, lambda _: None)
    for word in ("CIFAR-100 not found", "no-server", "--data-dir", "cifar-100-python.tar.gz"):
        assert word in error


# Folders of images


def write_folder(root: Path, test: str = "val", classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    """Images of one colour: the class's number in red, the image's in green; 12 and 2 a class."""
    for part, n in (("train", 12), (test, 2)):
        for c, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                suffix = (".png", ".bmp", ".PNG")[i % 3]
                Image.new("RGB", (40 + i, 30), (100 * c, 10 * i, 7)).save(folder / f"{i:02}{suffix}")
    (root / "train" / "README.txt").write_text("not a class")
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    (root / "train" / "ant" / "._00.png").write_text("what macOS leaves")
    return root


@pytest.mark.parametrize("test", ["val", "test"])
def test_a_folder_of_images(test, tmp_path):
    heard: list[str] = []
    loaded = data.load("folder", write_folder(tmp_path, test), heard.append)
    assert loaded.train_images.shape == (24, 3, 32, 32)
    assert loaded.train_images.dtype == torch.uint8
    assert (loaded.classes, loaded.channels, loaded.image_size) == (2, 3, 32)
    assert loaded.train_labels.tolist() == [0] * 12 + [1] * 12
    assert loaded.test_labels.tolist() == [0, 0, 1, 1]
    assert loaded.train_images[:, 1, 5, 5].tolist() == 2 * [10 * i for i in range(12)]
    assert (loaded.train_images[12:, 0] == 100).all()
    assert loaded.validation_size == 2
    assert heard == [f"Reading 28 images of 2 classes from {tmp_path}"]


def test_a_folder_has_a_size_of_its_own(tmp_path):
    loaded = data.load("folder", write_folder(tmp_path), print, 48)
    assert loaded.test_images.shape == (4, 3, 48, 48)
    assert loaded.image_size == 48


def test_the_middle_of_an_image_is_kept_and_every_mode_becomes_rgb(tmp_path):
    write_folder(tmp_path)
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255  # black, white, black: the square in the middle is white
    Image.fromarray(pixels).save(tmp_path / "val" / "ant" / "00.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).convert("L").save(tmp_path / "val" / "ant" / "01.bmp")
    Image.fromarray(pixels).convert("P").save(tmp_path / "val" / "bee" / "00.png")
    Image.fromarray(pixels).convert("RGBA").resize((600, 200)).save(tmp_path / "val" / "bee" / "02.webp")
    Image.fromarray(pixels).save(tmp_path / "val" / "bee" / "03.jpg", quality=100)
    loaded = data.load("folder", tmp_path)
    assert len(loaded.test_labels) == 6
    images = loaded.test_images[[0, 1, 2, 4, 5]]
    assert images[:, :, 4:28, 4:28].min() > 230


def test_test_stands_before_val(tmp_path):
    write_folder(tmp_path)
    for name in ("ant", "bee"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / name / "only.png")
    assert len(data.load("folder", tmp_path).test_labels) == 2


def test_a_corrupt_image_is_named(tmp_path):
    path = write_folder(tmp_path) / "train" / "bee" / "03.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>", whole[:100] + bytes(200) + whole[300:]):
        path.write_bytes(content)
        assert error_of("folder", tmp_path).startswith(f"{path}: cannot be read (")
    path.unlink()
    path.mkdir()
    assert error_of("folder", tmp_path).startswith(f"{path}: cannot be read (")


def test_an_image_too_large_to_be_meant_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert error_of("folder", tmp_path).startswith(
        f"{tmp_path / 'train' / 'ant' / '00.png'}: cannot be read ("
    )


def test_classes_that_differ_are_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "wasp")
    error = error_of("folder", tmp_path)
    assert error == f"{tmp_path / 'val'} has no folder 'bee', a class of {tmp_path / 'train'}"
    (tmp_path / "val" / "bee").mkdir()
    error = error_of("folder", tmp_path)
    assert error == f"{tmp_path / 'train'} has no folder 'wasp', a class of {tmp_path / 'val'}"


def test_an_empty_class_is_named(tmp_path):
    write_folder(tmp_path)
    for path in (tmp_path / "val" / "bee").iterdir():
        path.unlink()
    assert error_of("folder", tmp_path).startswith(
        f"{tmp_path / 'val' / 'bee'} has no image: takes .png, .jpg"
    )


def test_a_folder_of_another_form_is_named(tmp_path):
    assert "--data-dir" in error_of("folder")
    assert f"{tmp_path} has no train" in error_of("folder", tmp_path)
    (tmp_path / "train").mkdir()
    assert f"{tmp_path} has no test and no val" in error_of("folder", tmp_path)
    (tmp_path / "test").mkdir()
    assert f"{tmp_path / 'train'} has 0 folders" in error_of("folder", tmp_path)


def test_more_images_than_memory_may_hold_are_refused(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr(data, "FOLDER_LIMIT", 28 * 3 * 32**2 - 1)
    error = error_of("folder", tmp_path)
    assert "28 images of 3×32×32 need" in error
    monkeypatch.setattr(data, "FOLDER_LIMIT", 28 * 3 * 32**2)
    data.load("folder", tmp_path)


# What a network gets


def made(n: int = 40, **options) -> data.Dataset:
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = torch.rand(3, 1, 1) + 0.1, torch.rand(3, 1, 1) + 0.1
    labels = torch.arange(n) % 20
    return data.Dataset(images, labels, images[:5], labels[:5], 4, 20, mean, std, **options)


def test_bytes_are_normalised_and_floats_are_as_they_are():
    loaded = made()
    expected = (loaded.test_images.double() / 255 - loaded.mean) / loaded.std
    normal = loaded.normalise(loaded.test_images)
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal, expected.float())
    indices = torch.tensor([3, 3, 39])
    assert torch.equal(loaded.batch(indices), loaded.normalise(loaded.train_images[indices]))
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert (digits.classes, digits.channels, digits.image_size) == data.SHAPES["digits"]
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(digits.batch(indices, generator), digits.train_images[indices])
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


@pytest.mark.parametrize("padding", [4, 1, 0])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augment_moves_and_flips(dtype, padding):
    images = torch.randint(1, 256, (400, 2, 9, 12), generator=torch.Generator().manual_seed(1)).to(dtype)
    out = data.augment(images, torch.Generator().manual_seed(2), padding)
    assert (out.shape, out.dtype) == (images.shape, images.dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    for image, moved in zip(images, out, strict=True):
        padded = torch.nn.functional.pad(image, (padding,) * 4)
        ways = []
        for down in range(2 * padding + 1):
            for right in range(2 * padding + 1):
                crop = padded[:, down : down + 9, right : right + 12]
                for flip, expected in enumerate((crop, crop.flip(2))):
                    if torch.equal(expected, moved):
                        ways.append((down, right, flip))
        assert len(ways) == 1
        seen.add(ways[0])
    assert len({flip for *_, flip in seen}) == 2
    assert {down for down, *_ in seen} == {right for _, right, _ in seen} == set(range(2 * padding + 1))
    assert len(seen) > 0.7 * min(400, 2 * (2 * padding + 1) ** 2)


def test_augmentation_is_of_its_seed_and_asked_for():
    indices = torch.arange(40)
    augmented, plain = made(augmented=True), made()

    def draw(dataset: data.Dataset, seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 100)  # which must not matter
        return dataset.batch(indices, torch.Generator().manual_seed(seed)) * 1.0

    augmented = data.replace(augmented, mean=plain.mean, std=plain.std)
    assert torch.equal(draw(augmented, 1), draw(augmented, 1))
    assert not torch.equal(draw(augmented, 1), draw(augmented, 2))
    assert torch.equal(draw(plain, 1), plain.batch(indices))
    assert torch.equal(augmented.batch(indices), plain.batch(indices))
    moved = data.augment(augmented.train_images, torch.Generator().manual_seed(1), 4)
    assert torch.equal(
        draw(augmented, 1), augmented.normalise(moved)
    )  # the border is black, as images have it


def test_a_data_set_moves_whole():
    loaded = made(augmented=True)
    moved = loaded.to(torch.device("meta"))
    assert {x.device.type for x in vars(moved).values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert (moved.classes, moved.validation_size, moved.augmented) == (20, 4, True)


def test_the_split_is_even_over_as_many_classes_as_there_are():
    labels = torch.arange(2000) % 100
    parts = data.split(labels, 200, 300, seed=1)
    assert labels[parts.labelled].bincount().tolist() == [3] * 100
    everything = torch.cat([parts.validation, parts.labelled, parts.pool])
    assert torch.equal(everything.sort().values, torch.arange(2000))
