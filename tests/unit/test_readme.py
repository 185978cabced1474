"""README's promises that a test can hold: its commands and links exist, and CI runs the one that it shows."""

import re
import subprocess
from pathlib import Path

from scalecryo.cli import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_every_command_shown_is_a_verb() -> None:
    code = "\n".join(README.split("```")[1::2])
    shown = set(re.findall(r"(?:^|bin/)scalecryo ([a-z]+)\b", code, flags=re.MULTILINE))
    assert shown
    assert shown <= {name for name in app if not name.startswith("-")}


def test_every_path_in_the_tree_exists() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for line in tree.strip().splitlines():
        name = line.split()[0]
        folder = ROOT if not line.startswith("  ") else ROOT / "scalecryo"
        assert (folder / name).exists(), name


def test_every_link_leads_to_a_page_or_a_heading() -> None:
    for page in (ROOT / "README.md", *(ROOT / "scalecryo" / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^):]+)\)", page.read_text()):
            name, _, heading = target.partition("#")
            text = (page.parent / name).read_text()
            headings = {line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines() if line[:1] == "#"}
            assert not heading or heading in headings, f"{page.name}: {target}"


def test_ci_finds_the_test_command() -> None:
    script = "sed -n '/^<!-- test command -->$/,/^```$/p' README.md | sed '1,2d;$d'"
    command = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert " -m pytest -q " in command
    assert script.split(" README")[0] in (ROOT / ".ci" / "run").read_text()
