"""The driver with every method: recipes, chains, several processes and seeds, going on after a kill, comparing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for library in ("typer", "rich", "matplotlib", "sklearn", "lightning_fabric", "tensorboard", "safetensors"):
    pytest.importorskip(library, reason="kdkernels[train] is not installed")

from kdkernels.methods import METHODS, METRICS  # noqa: E402
from kdkernels.train import data, load, loop, models, outputs, recipes  # noqa: E402
from kdkernels.train.__main__ import main  # noqa: E402

SHORT = ["--epochs", "2", "--teacher-epochs", "2"]
MAPS = ["--teacher", "cnn-16-32-64", "--student", "cnn-8-16-32"]  # of digits' 8×8 images
OF_MAPS = ("maskd", "mgd", "srrl", "simkd", "ijckd", "atsc")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits(out: Path, name: str, *arguments: str, code: int = 0) -> Path:
    flags = ["--data", "digits", "--out", str(out), "--name", name, "--device", "cpu", "--quiet"]
    assert main([*flags, *arguments]) == code
    return out / name


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def metrics_of(folder: Path, without: tuple[str, ...] = ()) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in without} for line in lines]


TIMES = ("seconds", "images_per_second")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_ships_what_was_scored(method, tmp_path):
    networks = MAPS if method in OF_MAPS else []
    more = ["--assistants", "mlp-256-256"] if method in ("takd", "dgkd") else []
    more += ["-o", "mask_steps=3"] if method == "maskd" else []
    folder = digits(tmp_path, method, "--method", method, *networks, *more, *SHORT)
    summary = summary_of(folder)
    lines = metrics_of(folder)
    for line in lines:
        assert sum(line["terms"].values()) == pytest.approx(line["train_loss"], rel=1e-4)
    whole = data.load("digits")
    shipped = load(folder / "student.safetensors")
    assert loop.accuracy(shipped, whole, "test") == pytest.approx(summary["student_accuracy"], abs=1e-3)
    assert summary["parameters"]["student"] == sum(p.numel() for p in shipped.parameters())
    assert summary["flops"]["student"] > 0
    if method in ("takd", "dgkd"):
        assert [m["model"] for m in lines[2:4]] == ["assistant_1"] * 2
        assert 0 <= summary["assistant_1_accuracy"] <= 100
    if method == "ijckd":
        assert {"bound_proxy/teacher_ce", "bound_proxy/student_ce"} <= set(lines[-1]["monitor"])
    if method == "rco":
        assert [p.name for p in sorted(folder.glob("teacher-anchor-*"))] == [
            "teacher-anchor-1.pt",
            "teacher-anchor-2.pt",
        ]


def test_rco_s_teacher_is_each_epoch_s_anchor(tmp_path):
    """Its first epoch is KD's from the first anchor, not from the teacher in the end."""
    course = digits(tmp_path, "course", "--method", "rco", "--anchors", "2", *SHORT, "--no-alone")

    def first_losses(folder: Path) -> list[float]:
        return [m["train_loss"] for m in metrics_of(folder) if m["epoch"] == 1 and m["model"] != "teacher"]

    of_anchors = [
        digits(
            tmp_path,
            f"from-{i}",
            *SHORT,
            "--no-alone",
            "--teacher-checkpoint",
            str(course / f"teacher-anchor-{i}.pt"),
        )
        for i in (1, 2)
    ]
    assert first_losses(course) == pytest.approx(first_losses(of_anchors[0]), rel=1e-5)
    assert first_losses(of_anchors[0]) != pytest.approx(first_losses(of_anchors[1]), rel=1e-3)


def test_several_teachers_adapt_each(tmp_path):
    folder = digits(
        tmp_path,
        "two",
        "--method",
        "atsc",
        "--teacher",
        "cnn-16-32-64,cnn-8-16-32",
        *MAPS[2:],
        *SHORT,
        "--no-alone",
    )
    summary = summary_of(folder)
    assert [m["model"] for m in metrics_of(folder)][:4] == ["teacher"] * 2 + ["teacher_2"] * 2
    assert 0 <= summary["teacher_2_accuracy"] <= 100
    shipped = load(folder / "student.safetensors")
    assert [head.in_features for head in shipped.classifiers] == [64, 32]


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_runs(metric, tmp_path):
    folder = digits(tmp_path, "m", "--method", "kd2m", "--metric", metric, *SHORT, "--no-alone", "--no-pool")
    assert {"hard", "distance"} == set(metrics_of(folder)[-1]["terms"])


def test_several_processes_give_one_process_s_result(tmp_path):
    """Also where a batch does not divide by two. SGD: AdamW makes much of a gradient that is rounding alone."""
    for method, networks in (("kd2m", MAPS), ("atsc", MAPS)):
        arguments = [
            "--data",
            "digits",
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
            "--quiet",
            "--method",
            method,
        ]
        arguments += [*networks, *SHORT, "--batch-size", "33", "--no-pool", "--no-alone"]
        arguments += ["--optimizer", "sgd", "--learning-rate", "0.02", "--teacher-learning-rate", "0.02"]
        alone = digits(tmp_path, f"{method}-1", *arguments[6:])
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "-m", "kdkernels.train", *arguments, "--name", f"{method}-2"],
            env=environment,
            capture_output=True,
            timeout=200,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        for one, two in zip(metrics_of(alone), metrics_of(tmp_path / f"{method}-2"), strict=True):
            assert (one["model"], one["epoch"]) == (two["model"], two["epoch"])
            assert two["train_loss"] == pytest.approx(one["train_loss"], rel=2e-3), (method, one, two)
            assert two["terms"] == pytest.approx(one["terms"], rel=1e-2)
            assert two["validation_accuracy"] == pytest.approx(one["validation_accuracy"], abs=0.9)


@pytest.mark.parametrize("method", ["kd", "mgd"])
def test_a_killed_run_goes_on_to_the_same_numbers(method, tmp_path):
    """SIGKILL, three times, wherever it strikes."""
    networks = MAPS if method == "mgd" else []
    arguments = ["--method", method, *networks, "--epochs", "8", "--teacher-epochs", "4", "--no-alone"]
    whole = digits(tmp_path, "whole", *arguments)
    flags = ["--data", "digits", "--out", str(tmp_path), "--name", "cut", "--device", "cpu", "--quiet"]
    command = [sys.executable, "-m", "kdkernels.train"]
    cut = tmp_path / "cut"
    lines = 0
    for start, lines_wanted in (
        ([*flags, *arguments], 3),
        (["--resume", str(cut), "--quiet"], 7),
        (None, 12),
    ):
        run = subprocess.Popen(
            [*command, *(start or ["--resume", str(cut), "--quiet"])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        try:
            deadline = time.monotonic() + 120
            while lines < lines_wanted and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
                path = cut / "metrics.jsonl"
                lines = path.read_bytes().count(b"\n") if path.exists() else 0
        finally:
            run.send_signal(signal.SIGKILL)
            error = run.communicate()[1]
        assert run.returncode == -signal.SIGKILL, error
    assert not (cut / "summary.json").exists()
    assert main(["--resume", str(cut), "--quiet"]) == 0
    assert metrics_of(cut, TIMES) == metrics_of(whole, TIMES)
    before, after = summary_of(whole), summary_of(cut)
    assert {k: v for k, v in before.items() if k.endswith("accuracy")} == {
        k: v for k, v in after.items() if k.endswith("accuracy")
    }
    assert after["seconds"] > 0
    for name in ("teacher", "student"):
        first, second = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in (whole, cut))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_resume_says_what_it_cannot_take(tmp_path, capsys):
    folder = digits(tmp_path, "done", *SHORT)
    cases = [
        (["--resume", str(tmp_path / "none")], ["--resume", "folder of a run"]),
        (["--resume", str(folder)], ["--resume", "finished"]),
        (["--resume", str(folder), "--seed", "1"], ["--resume", "--seed"]),
    ]
    for arguments, words in cases:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
        assert len(error.strip().splitlines()) == 1
    (folder / "summary.json").unlink()
    (folder / "state.pt").write_bytes(b"not a state")
    before = (folder / "student.pt").read_bytes()
    assert main(["--resume", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "state.pt" in error and "damaged" in error
    assert len(error.strip().splitlines()) == 1
    assert (folder / "student.pt").read_bytes() == before


def test_seeds_have_a_mean_and_a_spread(tmp_path):
    folder = digits(tmp_path, "three", "--seeds", "3", "--seed", "5", *SHORT)
    each = [summary_of(folder / f"seed-{seed}") for seed in (5, 6, 7)]
    values = torch.tensor([one["student_accuracy"] for one in each])
    summary = summary_of(folder)
    assert summary["seeds"] == [5, 6, 7]
    assert summary["student_accuracy"] == pytest.approx(float(values.mean()), abs=1e-3)
    assert summary["student_accuracy_std"] == pytest.approx(float(values.std()), abs=1e-3)
    alone = digits(tmp_path, "six", "--seed", "6", *SHORT)
    assert summary_of(alone)["student_accuracy"] == each[1]["student_accuracy"]


def test_compare_makes_a_table_and_a_plot(tmp_path, capsys):
    folders = [
        digits(tmp_path, "kd", "--seeds", "2", *SHORT),
        digits(tmp_path, "dkd", "--method", "dkd", *SHORT),
        digits(tmp_path, "m", "--method", "kd2m", "--metric", "coral", *SHORT),
    ]
    capsys.readouterr()
    out = tmp_path / "plot.png"
    assert main(["compare", *map(str, folders), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for word in ("kd", "dkd", "coral", "±"):
        assert word in text
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert main(["compare", str(tmp_path / "nothing")]) == 1
    assert "no finished run" in capsys.readouterr().err


def test_the_teacher_s_outputs_lie_in_npy_files_and_change_nothing(tmp_path, monkeypatch):
    import numpy as np

    plain = digits(tmp_path, "plain", "--method", "simkd", *MAPS, *SHORT)
    cached = digits(tmp_path, "cached", "--method", "simkd", *MAPS, *SHORT, "--cache-teacher")
    assert metrics_of(plain, TIMES) == metrics_of(cached, TIMES)
    folder = cached / "teacher-cache" / "student_same_images"
    images, maps = np.load(folder / "images.npy"), np.load(folder / "map.npy")
    whole = data.load("digits")
    parts = data.split(whole.train_labels, whole.validation_size, 100, 0)
    assert np.array_equal(images, parts.labelled.sort().values.numpy())
    assert maps.shape[:2] == (100, 64)
    monkeypatch.setattr(outputs, "IN_MEMORY", 0)  # then the teacher runs in every step
    anew = digits(tmp_path, "anew", "--method", "simkd", *MAPS, *SHORT)
    for one, two in zip(metrics_of(plain), metrics_of(anew), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)


def test_pieces_of_a_batch_give_the_batch_s_result(tmp_path):
    """Without batch normalisation, whose statistics are a piece's."""
    whole = digits(tmp_path, "whole", *SHORT)
    pieces = digits(tmp_path, "pieces", *SHORT, "--accumulate", "5")
    for one, two in zip(metrics_of(whole), metrics_of(pieces), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)


def test_mixed_precision_and_compile(tmp_path):
    for name, flags in (("amp", ["--amp", "bf16"]), ("compiled", ["--compile", "--no-pool", "--no-alone"])):
        folder = digits(tmp_path, name, "--method", "ijckd", *MAPS, *SHORT, *flags)
        assert summary_of(folder)["student_accuracy"] > 5
    plain = digits(tmp_path, "plain", "--method", "ijckd", *MAPS, *SHORT, "--no-pool", "--no-alone")
    for one, two in zip(metrics_of(plain), metrics_of(tmp_path / "compiled"), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)


def test_a_given_teacher_is_not_trained(tmp_path, capsys):
    first = digits(tmp_path, "first", *SHORT)
    checkpoint = str(first / "teacher.pt")
    folder = digits(tmp_path, "second", *SHORT, "--teacher-checkpoint", checkpoint)
    assert {line["model"] for line in metrics_of(folder)} == {
        "student_alone",
        "student_same_images",
        "student",
    }
    assert summary_of(folder)["teacher_accuracy"] == summary_of(first)["teacher_accuracy"]
    assert summary_of(folder)["student_accuracy"] == summary_of(first)["student_accuracy"]
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for path, word in (
        ("none.pt", "no such file"),
        ("bad.pt", "damaged"),
        ("other.pt", "of another model"),
        ("list.pt", "no state dict"),
    ):
        capsys.readouterr()
        digits(tmp_path, path[:-3], *SHORT, "--teacher-checkpoint", str(tmp_path / path), code=1)
        error = capsys.readouterr().err
        assert word in error and path in error, error
        assert len(error.strip().splitlines()) == 1


def test_a_recipe_is_a_start_that_flags_replace(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "method: dkd\ndata: digits\nepochs: 2\nteacher_epochs: 2\nlabels: 60\nschedule: step\nmilestones: [1]\n"
        "optimizer: sgd\nlearning_rate: 0.02\noptions: {beta: 3, warmup: 1}\npublished: {accuracy: 50, source: me}\n"
    )
    flags = ["--out", str(tmp_path), "--device", "cpu", "--quiet", "--recipe", str(path)]
    assert main([*flags, "--name", "a"]) == 0
    assert main([*flags, "--name", "b", "--labels", "80", "-o", "beta=5", "--temperature", "2"]) == 0
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert (a["method"], a["labels"], a["epochs"], a["optimizer"], a["milestones"]) == (
        "dkd",
        60,
        2,
        "sgd",
        [1],
    )
    assert a["options"] == {"beta": 3, "warmup": 1}
    assert a["published"] == {"accuracy": 50, "source": "me"}
    assert main([*flags, "--name", "c", "-o", "beta=1e-5"]) == 0
    assert json.loads((tmp_path / "c" / "config.json").read_text())["options"]["beta"] == 1e-5
    assert (b["labels"], b["options"]) == (80, {"beta": 5, "warmup": 1, "temperature": 2.0})


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_begun(name, tmp_path, monkeypatch):
    """Its flags are flags, its options the method's; it says what it aims at and where that is printed."""
    from kdkernels.train import __main__ as command

    begun = []
    monkeypatch.setattr(command, "_execute", lambda config, *_, **__: begun.append(config))
    assert main(["--recipe", name]) == 0
    config = begun[0]
    assert name.startswith(f"{config.method}-")
    content = recipes.read(name)
    assert content["published"]["source"]
    accuracy = content["published"]["accuracy"]
    assert accuracy == "not verified" or 40 < accuracy < 100
    for network in (config.teacher, config.student, *config.assistants):
        assert network is None or network.startswith("timm:") or network in models.NAMES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "none"], ["--method", "'none'", "simkd"]),
        (["--metric", "w2"], ["--metric", "kd"]),
        (["--method", "kd2m", "--metric", "w3"], ["--metric", "'w3'", "gaussian-w2"]),
        (["--teacher", "resnet9"], ["--teacher", "'resnet9'"]),
        (["--student", "x"], ["--student", "'x'"]),
        (["--teacher", "mlp-16,mlp-16"], ["--teacher", "atsc"]),
        (["--method", "rco", "--teacher-checkpoint", "x.pt"], ["--teacher-checkpoint", "anchors"]),
        (["--assistants", "mlp-16"], ["--assistants", "takd"]),
        (["--method", "mgd", "--temperature", "2"], ["--temperature", "mgd"]),
        (["-o", "beta=1"], ["--option", "'beta'", "temperature"]),
        (["-o", "beta"], ["--option", "NAME=VALUE"]),
        (["--recipe", "simkd-resnet32x4-resnet8x4-cifar10"], ["--recipe", "did you mean", "cifar100"]),
        (["--recipe", "none.yaml"], ["--recipe", "none.yaml", "No such file"]),
        (["--schedule", "step"], ["--milestones"]),
        (["--milestones", "20,10"], ["--milestones", "rising"]),
        (["--amp", "fp16", "--device", "cpu"], ["--amp", "bf16"]),
        (["--label-fraction", "2"], ["--label-fraction", "at most 1"]),
        (["--label-fraction", "0.001"], ["--label-fraction", "10 or more"]),
        (["--labels", "50", "--label-fraction", "0.5"], ["--label-fraction", "--labels"]),
        (["--cache-teacher", "--augment"], ["--cache-teacher", "--no-augment"]),
        (["--seeds", "0"], ["--seeds", "1 or more"]),
    ],
)
def test_a_bad_flag_is_named_with_what_it_takes(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "digits", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "maskd"], ["maskd", "maps"]),
        (["--method", "srrl", "-o", "variant=mine"], ["srrl", "variant", "'mine'"]),
        (["--method", "simkd", "-o", "factor=0"], ["simkd", "factor"]),
        (["--method", "dgkd", "-o", "drop=5", "--assistants", "mlp-256-256"], ["dgkd", "drop"]),
    ],
)
def test_models_that_do_not_fit_say_so_before_training(arguments, words, tmp_path, capsys):
    digits(tmp_path, "x", *arguments, code=1)
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


def test_list_names_everything(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    for name in (*METHODS, *METRICS, *data.NAMES, *models.NAMES, *recipes.names()):
        assert name in out


def test_a_folder_of_images_is_learnt(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="kdkernels[train] is not installed")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 30), ("val", 8)):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(80, (20, 24, 3), generator=generator) + 150 * label
                image.fromarray(pixels.byte().numpy()).save(folder / f"{i}.png")
    arguments = [
        "--data",
        "folder",
        "--data-dir",
        str(tmp_path / "images"),
        "--image-size",
        "16",
        "--labels",
        "20",
    ]
    arguments += ["--teacher", "cnn-16-32-64", "--student", "cnn-8-16-32", "--method", "ijckd", "--no-pool"]
    flags = ["--out", str(tmp_path), "--name", "run", "--device", "cpu", "--quiet", "--epochs", "6"]
    assert main([*arguments, *flags, "--teacher-epochs", "6"]) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["images"]["test"] == 16
    assert summary["student_accuracy"] > 80
    shipped = load(tmp_path / "run" / "student.safetensors")
    assert shipped(torch.zeros(2, 3, 16, 16)).shape == (2, 2)
