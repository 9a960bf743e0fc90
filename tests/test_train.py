"""The training driver: what a run leaves behind, what its loss is, and what it says when it cannot go on."""

import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

for library in ("typer", "rich", "matplotlib", "sklearn", "lightning_fabric", "tensorboard", "safetensors"):
    pytest.importorskip(library, reason="kdkernels[train] is not installed")

from rich.console import Console  # noqa: E402

from kdkernels.methods import deployable, load_deployable  # noqa: E402
from kdkernels.train import data, experiment, loop, models, report, signals  # noqa: E402
from kdkernels.train.__main__ import main  # noqa: E402

MODELS = ("teacher", "student_alone", "student_same_images", "student")
FEW = ["--epochs", "3", "--teacher-epochs", "2"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Batches this small gain nothing from threads, and beside other programs they lose tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_digits(out: Path, name: str, *arguments: str) -> dict:
    assert main(["--data", "digits", "--out", str(out), "--name", name, "--device", "cpu", *arguments]) == 0
    return json.loads((out / name / "summary.json").read_text())


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def default_digits(tmp_path_factory):
    """The default recipe on digits: folder and summary."""
    out = tmp_path_factory.mktemp("runs")
    return out / "default", run_digits(out, "default", "--quiet")


def write_idx(path: Path, content: np.ndarray) -> None:
    header = bytes([0, 0, 8, content.ndim]) + b"".join(n.to_bytes(4, "big") for n in content.shape)
    path.write_bytes(gzip.compress(header + content.astype(np.uint8).tobytes(), mtime=0))


@pytest.fixture
def fashion(tmp_path):
    """A small made data set in Fashion-MNIST's files: 300 + 60 images, each a bright band at its class."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, n in (("train", 300), ("t10k", 60)):
        labels = np.arange(n) % 10
        images = generator.integers(0, 60, (n, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 4] += 180
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No Debian package and an empty cache."""
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "no-package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


# A whole run


def test_a_run_leaves_every_file_whole(default_digits):
    folder, summary = default_digits
    names = {"config.json", "metrics.jsonl", "summary.json", "curves.png", "tensorboard"}
    names |= {f"{name}.{end}" for name in MODELS for end in ("pt", "safetensors")}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert (config["data"], config["labels"], config["temperature"], config["seed"]) == (
        "digits",
        100,
        4.0,
        0,
    )
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = metrics_of(folder)
    assert [line["model"] for line in lines] == ["teacher"] * 30 + [m for m in MODELS[1:] for _ in range(60)]
    assert {"model", "epoch", "train_loss", "validation_accuracy", "seconds"} <= set(lines[0])
    for name in MODELS:
        assert 0 <= summary[f"{name}_accuracy"] <= 100
    assert summary["seconds"] > 0
    assert summary["images_per_second"] > 0


def test_the_weights_on_disk_are_those_that_were_scored(default_digits):
    folder, summary = default_digits
    digits = data.load("digits")
    for name in MODELS:
        model = (models.teacher if name == "teacher" else models.student)("digits")
        shipped = load_deployable(folder / f"{name}.safetensors", model)
        model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
        for module in (model.eval(), shipped):
            score = loop.accuracy(module, digits, "test")
            assert score == pytest.approx(summary[f"{name}_accuracy"], abs=1e-3)


def test_the_kept_epoch_is_the_best_on_validation(default_digits):
    folder, summary = default_digits
    for name in MODELS:
        scores = {m["epoch"]: m["validation_accuracy"] for m in metrics_of(folder) if m["model"] == name}
        assert summary["best_epoch"][name] == max(scores, key=lambda epoch: (scores[epoch], -epoch))


def test_distilling_beats_training_alone(default_digits):
    _, summary = default_digits
    assert summary["teacher_accuracy"] > 95
    assert summary["student_alone_accuracy"] > 75
    assert summary["student_same_images_accuracy"] > summary["student_alone_accuracy"]
    assert summary["student_accuracy"] > summary["student_alone_accuracy"] + 2


def test_a_seed_gives_the_same_accuracies(tmp_path):
    first, again, other = (
        run_digits(tmp_path, name, *FEW, "--seed", seed)
        for name, seed in (("a", "3"), ("b", "3"), ("c", "4"))
    )
    accuracies = [[s[f"{name}_accuracy"] for name in MODELS] for s in (first, again, other)]
    assert accuracies[0] == accuracies[1] != accuracies[2]
    weights = [torch.load(tmp_path / name / "student.pt") for name in "ab"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_no_choice_depends_on_the_test_set(tmp_path, monkeypatch):
    digits = data.load("digits")
    run_digits(tmp_path, "real", *FEW)
    wrong = (digits.test_labels + 1) % 10
    blind = data.Dataset(digits.train_images, digits.train_labels, -digits.test_images, wrong, 237)
    monkeypatch.setattr(data, "load", lambda *_: blind)
    run_digits(tmp_path, "blind", *FEW)
    for name in MODELS:
        real, other = (torch.load(tmp_path / run / f"{name}.pt") for run in ("real", "blind"))
        assert all(torch.equal(real[key], other[key]) for key in real)


def test_a_log_gets_a_line_now_and_then_and_the_table(tmp_path, capsys):
    run_digits(tmp_path, "log", *FEW)
    out = capsys.readouterr().out
    assert "teacher: epoch 2/2" in out
    assert "student with pool: epoch 3/3" in out
    assert "test %" in out
    assert "\x1b" not in out
    run_digits(tmp_path, "quiet", *FEW, "--quiet")
    out = capsys.readouterr().out
    assert "epoch 3/3" not in out
    assert "test %" in out


def test_every_image_may_have_its_label(tmp_path):
    summary = run_digits(tmp_path, "all", *FEW, "--labels", "1200")
    assert summary["images"]["pool"] == 0
    assert summary["student_accuracy"] == summary["student_same_images_accuracy"]


def test_one_batch_one_epoch(tmp_path):
    run_digits(tmp_path, "one", "--epochs", "1", "--teacher-epochs", "1", "--batch-size", "100000")


# The split and the batches


def test_the_split_is_disjoint_even_and_of_its_seed():
    labels = torch.arange(1000) % 10
    parts = data.split(labels, 200, 50, seed=1)
    everything = torch.cat([parts.validation, parts.labelled, parts.pool])
    assert [len(parts.validation), len(parts.labelled), len(parts.pool)] == [200, 50, 750]
    assert torch.equal(everything.sort().values, torch.arange(1000))
    assert labels[parts.labelled].bincount().tolist() == [5] * 10
    assert torch.equal(parts.labelled, data.split(labels, 200, 50, seed=1).labelled)
    assert not torch.equal(parts.labelled, data.split(labels, 200, 50, seed=2).labelled)
    # More labels extend the fewer ones; validation stays.
    more = data.split(labels, 200, 100, seed=1)
    assert torch.equal(more.validation, parts.validation)
    assert torch.equal(more.labelled[:50], parts.labelled)


def test_the_students_start_equal_and_see_equal_labelled_batches(tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    first: dict[str, torch.Tensor] = {}
    real_fit, real_steps = loop.Fit, loop.steps_of

    def fit(training, *rest):
        first[training.name] = training.learner.student[0].weight.detach().clone()
        return real_fit(training, *rest)

    def steps(training, epoch):
        for labelled, pool in real_steps(training, epoch):
            seen.setdefault(training.name, []).append(labelled.tolist())
            yield labelled, pool

    monkeypatch.setattr(experiment, "Fit", fit)
    monkeypatch.setattr(loop, "steps_of", steps)
    run_digits(tmp_path, "equal", *FEW)
    assert seen["student_alone"] == seen["student_same_images"] == seen["student"]
    assert len(seen["student"]) == 3 * 2
    assert torch.equal(first["student_alone"], first["student"])
    assert torch.equal(first["student_alone"], first["student_same_images"])


def test_an_epoch_sees_every_image_once_in_a_new_order(monkeypatch):
    training = loop.Training(
        "student", "", "", None, torch.arange(100, 201), loop.Optimisation(2, 20, 0.1), seed=1
    )
    orders = [torch.cat([labelled for labelled, _ in loop.steps_of(training, epoch)]) for epoch in (1, 2, 1)]
    assert torch.equal(orders[0].sort().values, training.labelled)
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    assert [len(labelled) for labelled, _ in loop.steps_of(training, 1)] == [20, 20, 20, 20, 21]


def test_the_pool_is_taken_round_and_round():
    how = loop.Optimisation(4, 5, 0.1)
    training = loop.Training(
        "student", "", "", None, torch.arange(10), how, pool=torch.arange(100, 130), pool_ratio=2
    )
    drawn = torch.cat([pool for epoch in (1, 2, 3) for _, pool in loop.steps_of(training, epoch)])
    assert drawn.tolist() == [*range(100, 130), *range(100, 130)]


def test_learning_rates_fall_as_they_should():
    cosine = loop.Optimisation(10, 5, 0.1, final_rate=0.01)
    assert cosine.factor(0, 4) == 1
    assert cosine.factor(20, 4) == pytest.approx(0.505)
    assert cosine.factor(40, 4) == pytest.approx(0.01)
    steps = loop.Optimisation(10, 5, 0.1, schedule="step", milestones=(3, 6), decay=0.1)
    factors = [steps.factor(4 * epoch, 4) for epoch in (0, 2, 3, 5, 6, 9)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert steps.factor(11, 4) == 1  # the last step of epoch 3 is before the milestone
    assert loop.Optimisation(10, 5, 0.1, schedule="constant").factor(33, 4) == 1


# Data


def test_made_files_are_read(fashion, tmp_path):
    made = data.load("fashion-mnist", fashion)
    assert made.train_images.shape == (300, 1, 28, 28)
    assert made.train_labels[:12].tolist() == [*range(10), 0, 1]
    assert made.validation_size == 30
    arguments = ["--data-dir", str(fashion), "--out", str(tmp_path), "--name", "made", "--labels", "40"]
    assert main([*arguments, *FEW, "--device", "cpu", "--quiet"]) == 0


def test_nothing_works_names_all_three_ways(nowhere, monkeypatch, capsys):
    monkeypatch.setattr(data, "OFFICIAL_URL", (nowhere / "no-server").as_uri() + "/")
    assert main(["--out", str(nowhere / "runs")]) == 1
    line = capsys.readouterr().err.strip().splitlines()
    assert len(line) == 1
    for word in ("dataset-fashion-mnist", "--data-dir", "no-server", "--data digits"):
        assert word in line[0]
    assert not (nowhere / "runs").exists()


def test_a_named_folder_is_not_replaced_by_another(tmp_path, capsys):
    assert main(["--data-dir", str(tmp_path), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz" in error
    assert "dataset-fashion-mnist" in error


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-200])
    return "truncated"


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return "gzip"


def damage_not_gzip(path):
    path.write_bytes(b"<html>not found</html>")
    return "gzip"


def damage_magic(path):
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(b"\0\0\x08\1" + raw[4:]))
    return "magic number is 2049"


def damage_short(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-784]))
    return "300×28×28 = 235200 bytes of data, it holds 234416"


def damage_count(path):
    write_idx(path, np.zeros((299, 28, 28)))
    return "300 labels for 299 images"


def damage_size(path):
    write_idx(path, np.zeros((300, 32, 32)))
    return "32×32"


def damage_empty(path):
    path.write_bytes(b"")
    return "magic number"


@pytest.mark.parametrize("damage", [v for k, v in sorted(globals().items()) if k.startswith("damage_")])
def test_a_damaged_file_is_named(damage, fashion, tmp_path, capsys):
    expected = damage(fashion / "train-images-idx3-ubyte.gz")
    assert main(["--data-dir", str(fashion), "--out", str(tmp_path / "runs")]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert str(fashion) in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_label_out_of_range_is_refused(fashion):
    write_idx(fashion / "t10k-labels-idx1-ubyte.gz", np.full(60, 10))
    with pytest.raises(data.DataError, match=r"t10k-labels.*label 10"):
        data.load("fashion-mnist", fashion)


@pytest.fixture
def server(fashion):
    """The made files on http://127.0.0.1."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(fashion))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def checksums(folder: Path) -> dict[str, str]:
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in data.OFFICIAL_MD5}


def test_a_download_is_checked_and_kept(nowhere, fashion, server, monkeypatch):
    monkeypatch.setattr(data, "OFFICIAL_URL", server)
    monkeypatch.setattr(data, "OFFICIAL_MD5", checksums(fashion))
    heard: list[str] = []
    downloaded = data.load("fashion-mnist", None, heard.append)
    assert len(heard) == 4
    assert len(downloaded.train_labels) == 300
    assert {path.name for path in data.cache_folder().iterdir()} == set(data.OFFICIAL_MD5)
    monkeypatch.setattr(data, "OFFICIAL_URL", "http://127.0.0.1:1/")
    again = data.load("fashion-mnist", None, heard.append)  # from the cache
    assert len(heard) == 4
    assert torch.equal(again.test_images, downloaded.test_images)


def test_a_download_with_another_checksum_is_not_kept(nowhere, server, monkeypatch, capsys):
    monkeypatch.setattr(data, "OFFICIAL_URL", server)  # the made files under the real checksums
    assert main(["--out", str(nowhere / "runs")]) == 1
    error = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz" in error
    assert data.OFFICIAL_MD5["train-images-idx3-ubyte.gz"] in error
    assert list(data.cache_folder().iterdir()) == []


@pytest.mark.skipif(not data.DEBIAN_FOLDER.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_debian(tmp_path, monkeypatch):
    whole = data.load("fashion-mnist")
    assert whole.train_images.shape == (60000, 1, 28, 28)
    assert whole.test_images.shape == (10000, 1, 28, 28)
    assert whole.train_labels.bincount().tolist() == [6000] * 10
    assert abs(whole.train_images.mean()) < 0.01
    assert abs(whole.train_images.std() - 1) < 0.01
    few = data.Dataset(
        whole.train_images[:1500],
        whole.train_labels[:1500],
        whole.test_images[:200],
        whole.test_labels[:200],
        200,
    )
    monkeypatch.setattr(data, "load", lambda *_: few)
    arguments = ["--out", str(tmp_path), "--name", "few", "--labels", "100", "--device", "cpu"]
    assert main([*arguments, "--epochs", "1", "--teacher-epochs", "1"]) == 0
    summary = json.loads((tmp_path / "few" / "summary.json").read_text())
    assert summary["teacher_accuracy"] > 20
    assert (summary["parameters"]["teacher"], summary["parameters"]["student"]) == (70330, 6274)


# Flags


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], ["--epochs", "'0'", "1 or more"]),
        (["--epochs", "many"], ["--epochs", "'many'", "whole number"]),
        (["--teacher-epochs", "-1"], ["--teacher-epochs", "'-1'", "1 or more"]),
        (["--batch-size", "0"], ["--batch-size", "'0'", "1 or more"]),
        (["--pool-ratio", "0"], ["--pool-ratio", "'0'", "1 or more"]),
        (["--temperature", "0"], ["--temperature", "'0'", "above 0"]),
        (["--temperature", "-2"], ["--temperature", "'-2'", "above 0"]),
        (["--temperature", "nan"], ["--temperature", "'nan'", "above 0"]),
        (["--learning-rate", "inf"], ["--learning-rate", "'inf'", "above 0"]),
        (["--soft-weight", "1.5"], ["--soft-weight", "'1.5'", "0 to 1"]),
        (["--seed", "-1"], ["--seed", "'-1'", "0 to"]),
        (["--labels", "5"], ["--labels", "got 5", "10 or more"]),
        (["--labels", "1201"], ["--labels", "got 1201", "at most 1200"]),
        (["--data", "cifar"], ["--data", "'cifar'", "'fashion-mnist'", "'digits'"]),
        (["--data-dir", "x"], ["--data-dir", "'x'", "digits"]),
        (["--device", "tpu"], ["--device", "'tpu'", "'auto'", "'cpu'", "'cuda'"]),
        (["--name", "a/b"], ["--name", "'a/b'", "one folder"]),
        (["--name", ".."], ["--name", "'..'", "one folder"]),
        (["--out", __file__], ["--out", __file__, "folder"]),
        (["--out", "/proc/nothing"], ["--out", "/proc/nothing", "folder"]),
        (["--nonsense"], ["--nonsense"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_bad_flag_is_named_with_what_it_takes(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "digits", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "--device" in capsys.readouterr().err


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_never_writes_into_another(tmp_path, capsys, monkeypatch):
    run_digits(tmp_path, "mine", *FEW)
    before = contents(tmp_path / "mine")
    assert main(["--data", "digits", "--out", str(tmp_path), "--name", "mine"]) == 2
    assert "--name" in capsys.readouterr().err
    assert before == contents(tmp_path / "mine")
    monkeypatch.setattr(time, "strftime", lambda _: "now")  # two runs in one second
    for _ in range(2):
        assert main(["--data", "digits", "--out", str(tmp_path / "runs"), *FEW, "--quiet"]) == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["digits-100-labels-seed-0-now", "digits-100-labels-seed-0-now-2"]


def test_help_names_every_flag(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    flags = (
        "data data-dir labels epochs teacher-epochs batch-size temperature soft-weight seed device out name"
    )
    assert all(f"--{flag}" in out for flag in flags.split())


# What stops a run


def assert_readable(folder: Path) -> None:
    """Every file in the folder is whole: checkpoints load, each metrics line parses, no temporary is left."""
    metrics_of(folder)
    json.loads((folder / "config.json").read_text())
    for path in folder.glob("*.pt"):
        if path.stem == "state":
            torch.load(path, weights_only=True)
            continue
        model = (models.teacher if path.stem == "teacher" else models.student)("digits")
        model.load_state_dict(torch.load(path, weights_only=True))
    assert not list(folder.glob(".*"))


class FullDisk:
    """A file of `real` that takes `room` more bytes, for all such files together."""

    room = 0

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.real.close()

    def write(self, content):
        part = content[: FullDisk.room]
        FullDisk.room -= len(part)
        if not part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.real.write(part)
        if len(part) < len(content) and not hasattr(self.real, "readall"):  # buffered: all or an error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(part)


def fill_disk(monkeypatch, room: int) -> None:
    """From now on the run's files have room for so many bytes, all together."""

    def opened(*arguments, **options):
        return FullDisk(open(*arguments, **options))

    monkeypatch.setattr(FullDisk, "room", room)
    for module in (report, deployable):
        monkeypatch.setattr(module, "open", opened, raising=False)


@pytest.mark.parametrize("room", [0, 100, 2_000, 345_000, 351_060, 352_000, 400_000])
def test_a_full_disk_leaves_whole_files(room, tmp_path, monkeypatch, capsys):
    fill_disk(monkeypatch, room)
    code = main(["--data", "digits", "--out", str(tmp_path), "--name", "full", *FEW, "--epochs", "30"])
    assert code == 1
    error = capsys.readouterr().err
    assert "disk full" in error
    assert len(error.strip().splitlines()) == 1
    folder = tmp_path / "full"
    if room >= 2_000:
        checkpoints = [path for path in folder.glob("*.pt") if path.stem != "state"]
        assert ("no checkpoint yet" in error) == (not checkpoints)
        assert not checkpoints or any(str(path) in error for path in checkpoints)
    if (folder / "metrics.jsonl").exists():
        assert_readable(folder)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "student.pt"
    report.write_atomically(path, b"old")
    fill_disk(monkeypatch, 2)
    with pytest.raises(OSError, match="No space left"):
        report.write_atomically(path, b"newer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_that_does_not_fit_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    report.append_line(path, '{"a": 1}')
    fill_disk(monkeypatch, 5)
    with pytest.raises(OSError, match="No space left"):
        report.append_line(path, '{"a": 2}')
    assert path.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "term")]
)
def test_a_signal_leaves_the_last_checkpoint_whole(number, code, word, tmp_path):
    command = [
        sys.executable,
        "-m",
        "kdkernels.train",
        "--data",
        "digits",
        "--out",
        str(tmp_path),
        "--name",
        "cut",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("OMP_WAIT_POLICY", None)
    if number == signal.SIGTERM:  # the other run takes the restart that sets it
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    run = subprocess.Popen(
        [*command, "--epochs", "1000000", "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    checkpoint = tmp_path / "cut" / "student_alone.pt"
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(number)
        _, error = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == code, error
    assert error.startswith(f"error: {word}")
    assert len(error.strip().splitlines()) == 1
    assert str(checkpoint) in error
    assert_readable(tmp_path / "cut")


@pytest.fixture
def begun(tmp_path):
    """A report in whose first training an epoch ended."""
    optimisation = loop.Optimisation(1000, 10, 0.1)
    training = loop.Training("student", "student", "", None, torch.arange(20), optimisation)
    one = report.Report(tmp_path, None, {}, Console(file=io.StringIO()), True)
    one.begin(training, 1)
    return one, training, loop.Epoch(1, 1.0, 50.0, 20, 1.0, {"soft": 1.0})


class SignalAt:
    """A trace function that sends SIGINT at one of the instructions of Python's queues and conditions."""

    FILES = (queue.__file__, threading.__file__)

    def __init__(self, wanted: int) -> None:
        self.wanted, self.seen = wanted, 0

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in self.FILES:
            return None
        frame.f_trace_opcodes = True
        self.seen += 1
        if self.seen == self.wanted:
            signal.raise_signal(signal.SIGINT)
        return self


def test_a_signal_while_an_epoch_is_reported_does_not_lock_up_the_end(tmp_path, begun):
    """At whatever instruction it comes: a queue's lock, taken and not given back, had made a run wait for ever."""
    one, training, epoch = begun
    before, number, came = sys.gettrace(), 0, 0
    while came == number:
        number += 1
        try:
            with signals.handled():
                sys.settrace(SignalAt(number))
                one.epoch(training, epoch)
        except signals.Stopped:
            came += 1
        finally:
            sys.settrace(before)
        ending = threading.Thread(target=one.writer.flush, daemon=True)
        ending.start()
        ending.join(30)
        assert not ending.is_alive(), f"instruction {number}"
    one.writer.close()
    assert number > 200
    lines = metrics_of(tmp_path)
    assert len(lines) == number and len(one.history["student"]) == number


def test_a_signal_that_was_dropped_ends_the_run_at_the_next_step(begun):
    one, training, _ = begun
    advance = one.begin(training, 1)
    with pytest.raises(signals.Stopped, match="interrupted"), signals.handled():
        advance()
        with suppress(BaseException):  # as code in C does
            signal.raise_signal(signal.SIGINT)
        advance()
    with signals.handled():  # the next run is not stopped by it
        advance()


def test_a_held_signal_waits_for_the_outermost_end():
    done = []
    with pytest.raises(signals.Stopped, match="terminated") as stopped, signals.handled():
        with signals.held():
            with signals.held():
                signal.raise_signal(signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]
    assert stopped.value.code == 143


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch, capsys):
    digits = data.load("digits")
    digits.train_images[:500] = torch.nan
    monkeypatch.setattr(data, "load", lambda *_: digits)
    assert main(["--data", "digits", "--out", str(tmp_path), "--name", "nan"]) == 1
    error = capsys.readouterr().err
    assert "the loss became nan" in error
    assert "epoch 1 of 30 of the teacher" in error
    assert "no checkpoint yet" in error
    batch = torch.load(tmp_path / "nan" / "bad-batch.pt", weights_only=True)
    assert str(tmp_path / "nan" / "bad-batch.pt") in error
    assert (batch["epoch"], batch["step"]) == (1, 1)
    assert torch.equal(batch["labels"], digits.train_labels[batch["indices"]])
    torch.testing.assert_close(batch["images"], digits.train_images[batch["indices"]], equal_nan=True)


def test_the_batch_that_is_kept_is_the_one_that_was_not_a_number(tmp_path, monkeypatch, capsys):
    digits = data.load("digits")
    parts = data.split(digits.train_labels, digits.validation_size, 100, 0)
    everything = torch.cat([parts.labelled, parts.pool])
    training = loop.Training("teacher", "", "", None, everything, loop.Optimisation(30, 128, 0.1))
    fourth, _ = list(loop.steps_of(training, 1))[3]
    digits.train_images[fourth[7]] = torch.nan
    monkeypatch.setattr(data, "load", lambda *_: digits)
    assert main(["--data", "digits", "--out", str(tmp_path), "--name", "nan", "--quiet"]) == 1
    assert "the loss became nan in step 4" in capsys.readouterr().err
    batch = torch.load(tmp_path / "nan" / "bad-batch.pt", weights_only=True)
    assert torch.equal(batch["indices"], fourth)
