"""The command line's contract: verbs, exit codes, one-line errors, and no torch behind a help text."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest

import scalecryo
from scalecryo.cli import app, main, words_of
from scalecryo.commands.examples import EXAMPLES
from scalecryo.commands.glossary import TERMS
from scalecryo.commands.setting_options import COMMON
from scalecryo.config import SETTINGS
from tests.conftest import SimulatedParticles

VERBS = ("simulate", "convert", "info", "verify", "train", "assign", "evaluate", "export", "demo", "select", "help")


def run(*tokens: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(tokens)
    return int(caught.value.code or 0)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([verb, "--help"])
    assert verb in capsys.readouterr().out


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


def test_the_package_is_run_as_a_module_too() -> None:
    result = subprocess.run([sys.executable, "-m", "scalecryo", "--version"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == scalecryo.__version__


@pytest.mark.parametrize(
    "tokens",
    [("simulat",), ("simulate", "a"), ("convert", "a", "b", "--dtype", "int8"), ("train",), ("verify", "a", "--fill"),
     ("export", "run", "--format", "relion"), ("simulate", "a", "b", "--n", "many"),
     ("simulate", "a", "b", "--symmetry", "C0"), ("evaluate", "a", "--truth", "b", "--symmetry", "I5")],
)  # fmt: skip
def test_wrong_usage_is_2_in_one_line(tokens: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*tokens) == 2
    error = capsys.readouterr().err
    assert error.startswith("scalecryo: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("tokens", "fragments"),
    [
        (["--pose.heds", "3"], ["pose.heads"]),
        (["--pos.heads", "3"], ["pose.heads"]),
        (["--train.steps", "many"], ["train.steps", "many", "int"]),
        (["--pose.source", "magic"], ["pose.source", "encoder", "table"]),
        (["--pose.centred", "maybe"], ["pose.centred", "maybe", "bool"]),
        (["--optim.clip_norm", "-1", "--pose.source=encoder"], ["optim.clip_norm", "-1.0", "at least 0"]),
        (["--train.steps", "3"], ["train.steps", "recipe guided", "pose.source = known"]),
        (["--guided.rungs", "3"], ["guided.rungs was renamed to guided.iterations"]),
        (["nowhere.toml"], ["nowhere.toml", "does not exist"]),
        (["--run.workers", "2:1"], ["run.workers", "MIN <= MAX"]),
        (["--symmetry", "Q3"], ["train.symmetry", "Q3", "C1, C7, D7"]),
        (["--symmetry", "C2", "--pose.source=encoder"], ["train.symmetry", "recipe autoencoder", "choose guided"]),
    ],
)
def test_wrong_setting_is_2_in_one_line(
    tokens: list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--data", "nowhere.zarr", "--out", "unused", *tokens) == 2
    error = capsys.readouterr().err
    assert error.startswith("scalecryo: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for fragment in fragments:
        assert fragment in error


def test_failure_is_1_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", "nowhere.zarr", "--out", "unused") == 1
    error = capsys.readouterr().err
    assert "nowhere.zarr" in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--debug", "--data", "nowhere.zarr", "--out", "unused", "--train.steps", "3") == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_option_of_another_verb_is_named_as_it_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "RUN", "--train.seed", "3") == 2
    assert "--train.seed" in capsys.readouterr().err


def test_settings_take_their_values() -> None:
    words, debug = words_of(
        ["train", "--pose.heads", "4", "--volume.gridding_correction", "--optim.clip_norm=-1", "--data", "s", "--debug",
         "--train.query", "-half < 0", "--pose.centred", "c.toml"]
    )  # fmt: skip
    assert debug
    assert words == ["train", "--pose.heads=4", "--volume.gridding_correction", "--optim.clip_norm=-1", "--data", "s",
                     "--train.query=-half < 0", "--pose.centred", "c.toml"]  # fmt: skip


def test_what_was_given_reaches_the_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(
        "scalecryo.commands.verbs._run", lambda verb, *args, **kwargs: seen.update(kwargs, verb=verb, args=args)
    )
    main(["train", "c.toml", "--data", "s", "--run.out", "r", "--pose.centred", "--volume.gridding-correction", "false",
          "--encoder.channels", "8,16", "--optim.clip_norm", "-1"])  # fmt: skip
    assert seen["verb"] == "train"
    assert seen["args"] == ("c.toml",)
    assert seen["overrides"] == {
        "run.data": "s", "run.out": "r", "pose.centred": True, "volume.gridding_correction": False,
        "encoder.channels": "8,16", "optim.clip_norm": -1.0,
    }  # fmt: skip


def test_help_of_train_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    text = capsys.readouterr().out
    assert not [name for name in SETTINGS if f"--{name}" not in text]
    assert text.index("--data") < text.index("--device") < text.index("--resume  ") < text.index("--train.steps")


@pytest.mark.parametrize("verb", EXAMPLES)
def test_every_example_is_a_command(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert len(EXAMPLES[verb]) == 3
    for _, example in EXAMPLES[verb]:
        assert f"scalecryo {example}" in text
        words, _ = words_of(shlex.split(example))
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_help_explains_words_groups_and_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for topic, said in (("terms", "half-maps"), ("guided", "--guided.start nothing|poses"), ("train", "--symmetry str"),
                        ("export", "--format cryodrgn")):  # fmt: skip
        main(["help", topic])
        text = capsys.readouterr().out
        assert said in text
        assert max(map(len, text.splitlines())) <= 120
    assert all(f"--{name.partition('.')[2].replace('_', '-')}" in _explained("train", capsys) for name in COMMON)
    assert run("help", "nothing") == 2
    assert "terms" in capsys.readouterr().err
    main(["help"])
    assert "simulate" in capsys.readouterr().out


def _explained(topic: str, capsys: pytest.CaptureFixture[str]) -> str:
    main(["help", topic])
    return capsys.readouterr().out


def test_words_of_the_glossary_are_sorted() -> None:
    words = [word.lower() for word in TERMS]
    assert words == sorted(words)


@pytest.mark.parametrize(
    ("verb", "advice", "number"),
    [("train", "--resume", signal.SIGINT), ("convert", "the same command", signal.SIGINT), ("info", "", signal.SIGINT),
     ("train", "--resume", signal.SIGTERM)],
)  # fmt: skip
def test_a_stop_from_outside_is_one_line(verb: str, advice: str, number: signal.Signals) -> None:
    code = (
        "import signal, sys, time, types\nfrom scalecryo.cli import main\n"
        # Where the tests run in the background they ignore Ctrl-C, and so would this one.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def run(*args, **kwargs):\n    print('running', flush=True)\n    time.sleep(60)\n"
        "sys.modules['scalecryo.commands.' + sys.argv[1]] = types.SimpleNamespace(run=run)\n"
        "sys.modules['scalecryo.commands.arguments'] = types.SimpleNamespace(check_convert=lambda *_, **__: None)\n"
        "main()\n"
    )
    words = [verb, "a"] + ["b"] * (verb == "convert")
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=300)
    assert process.returncode == 1
    assert error.startswith(f"scalecryo: stopped by {'SIGTERM' if number == signal.SIGTERM else 'the keyboard'}")
    assert advice in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "tokens",
    [["--help"], ["train", "--help"], ["--version"], ["train"],
     ["train", "--data", "s", "--out", "r", "--train.steps=3"], ["train", "--data", "s", "--pose.heds=3"],
     ["convert", "a", "b", "--invert", "--uninvert"], ["select", "a", "b.csv"]],
)  # fmt: skip
def test_help_and_wrong_usage_import_neither_torch_nor_ray(tokens: list[str]) -> None:
    # They must answer in half a second; torch alone takes seconds to import.
    code = (
        "import sys\nfrom scalecryo.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'zarr', 'numpy', 'matplotlib', 'dask'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *tokens], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_missing_inputs_are_refused_before_torch_is_imported(simulated: SimulatedParticles, tmp_path: Path) -> None:
    there, store, run = str(simulated.folder), simulated.store, str(tmp_path / "run")
    other = str(tmp_path / "other.mrcs")
    with mrcfile.new(other, np.zeros((2, 48, 48), np.float32)) as stack:
        stack.voxel_size = 3.2
    trained = tmp_path / "trained"  # its maps have a box that the store has not
    trained.mkdir()
    (trained / "config.toml").write_text(f'[run]\ndata = "{store}"\n')
    (trained / "metrics.jsonl").write_text('{"step": 1, "iteration/level": 6}\n')
    wrong = [
        ["simulate", "nowhere.pdb", "out"], ["simulate", there, "out", "--box", "65"],
        ["convert", "nowhere.star", "out"], ["convert", f"{there}/particles.star", store],
        ["convert", other, store, "--append"], ["info", "nowhere"],
        ["info", store, "--plan", "--gpus", "0"], ["verify", "nowhere"], ["train", "--data", "nowhere", "--out", run],
        ["train", "--data", store, "--out", run, "--train.box", "30"],
        ["train", "--data", store, "--out", run, "--mask", "nowhere.mrc"], ["assign", "nowhere"],
        ["assign", str(trained), "--data", store, "--out", "out"],
        ["evaluate", "nowhere", "--truth", there], ["evaluate", f"{there}/particles.star", "--truth", "nowhere"],
        ["export", "nowhere", "--format", "relion", "--out", "out"], ["select", "nowhere.star", "out.star"],
        ["select", f"{there}/particles.star", "out.star", "--min-confidence", "50"],
        ["demo", "--out", there],
    ]  # fmt: skip
    code = (
        "import json, sys\nfrom scalecryo.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as stop:\n        assert stop.code in (1, 2), words\n"
        "    else:\n        raise AssertionError(words)\n"
        "    heavy = {'torch', 'ray', 'zarr', 'roma', 'numba', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    command = [sys.executable, "-c", code, json.dumps(wrong)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == len(wrong)
    assert "--debug shows where" not in result.stderr, "every error is one that was foreseen"
