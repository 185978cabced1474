"""The command line's contract: verbs, exit codes, one-line errors, and no torch behind a help text."""

import subprocess
import sys

import pytest

from scalecryo.cli import main, split_tokens

VERBS = ("simulate", "convert", "info", "verify", "train", "assign", "evaluate", "export", "demo")


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


@pytest.mark.parametrize(
    "tokens",
    [("simulat",), ("simulate", "a"), ("convert", "a", "b", "--dtype", "int8"), ("train",), ("verify", "a", "--fill"),
     ("export", "run", "--format", "relion"), ("simulate", "a", "b", "--n", "many")],
)  # fmt: skip
def test_wrong_usage_is_2_in_one_line(tokens: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*tokens) == 2
    error = capsys.readouterr().err
    assert error.startswith("scalecryo: ")
    assert error.count("\n") == 1


def test_failure_is_1_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", "nowhere.zarr", "--out", "unused", "--pose.heds", "3") == 1
    error = capsys.readouterr().err
    assert "pose.heads" in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--data", "nowhere.zarr", "--out", "unused", "--pose.heds", "3", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_settings_become_overrides() -> None:
    plain, debug = split_tokens(
        ["train", "--pose.heads", "4", "--pose.symmetric_loss", "--optim.clip_norm=-1", "--data", "s"]
    )
    assert not debug
    assert plain == ["train", "--override=pose.heads=4", "--override=pose.symmetric_loss=true",
                     "--override=optim.clip_norm=-1", "--data", "s"]  # fmt: skip


@pytest.mark.parametrize("tokens", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_ray(tokens: list[str]) -> None:
    # The help must answer in half a second; torch alone takes seconds to import.
    code = (
        "import sys\nfrom scalecryo.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'zarr', 'numpy', 'matplotlib', 'dask'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *tokens], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
