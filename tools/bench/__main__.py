"""Run one benchmark, or list them all.

    python -m tools.bench                    # what there is
    python -m tools.bench NAME --help
    python -m tools.bench NAME [arguments]

From the checkout's root. A benchmark is a module of this folder with a `main()`; names that begin with `_` are helpers.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """First line of each benchmark's docstring, by its name."""
    modules = [path for path in sorted(FOLDER.glob("*.py")) if not path.stem.startswith("_")]
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0] for path in modules}


def main() -> None:
    found = benchmarks()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in found:
        print(__doc__)
        print("\n".join(f"{each:10s} {line}" for each, line in found.items()))
        sys.exit(0 if name in ("", "-h", "--help") else 2)
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    import_module(f"tools.bench.{name}").main()


if __name__ == "__main__":
    main()
