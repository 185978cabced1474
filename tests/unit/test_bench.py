"""The benchmarks' runner: lists them all, and each of them can at least be asked what it takes."""

import sys

import pytest

from tools.bench.__main__ import benchmarks, main


@pytest.mark.parametrize("name", sorted(benchmarks()))
def test_every_benchmark_says_what_it_takes(name: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: bench {name} ")


@pytest.mark.parametrize(("words", "code"), [([], 0), (["no-such"], 2)])
def test_the_runner_lists_them(words: list[str], code: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    shown = capsys.readouterr().out
    assert all(name in shown and line for name, line in benchmarks().items())
