"""What the package needs, of pyproject.toml and some extras, one requirement a line: the image installs it first.

python requirements.py pyproject.toml s3,gcs
"""

import sys
import tomllib
from pathlib import Path

path, extras = Path(sys.argv[1]), [extra for extra in sys.argv[2].split(",") if extra]
project = tomllib.loads(path.read_text())["project"]
wanted = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
sys.stdout.write("".join(f"{text}\n" for text in wanted))
