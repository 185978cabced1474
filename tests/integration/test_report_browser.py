"""The report in a browser, without a network: the surface is drawn and nothing is complained of."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from scalecryo.evaluate.report import Section, Surface, report_html, viewer_html
from scalecryo.evaluate.verdict import Verdict
from scalecryo.physics.mask import soft_sphere

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# What the page is asked once it has drawn: colours of the canvas, triangles, whether it overflows. The surface comes
# from another thread, which the page's virtual time does not wait for: hence asked again until there is one.
PROBE = """<script>
const canvas = document.querySelector("canvas");
const colours = () => {
  const copy = document.createElement("canvas");
  copy.width = canvas.width; copy.height = canvas.height;
  const pen = copy.getContext("2d");
  pen.drawImage(canvas, 0, 0);
  return new Set(new Uint32Array(pen.getImageData(0, 0, copy.width, copy.height).data.buffer)).size;
};
const once = (done, then, most) => done() || most === 0 ? then() : setTimeout(() => once(done, then, most - 1), 50);
once(() => Number(canvas.dataset.triangles) > 0 && colours() > 1, () => {
  const seen = colours(), before = Number(canvas.dataset.triangles), slider = document.querySelector("input");
  slider.value = slider.max * 0.9;
  slider.dispatchEvent(new Event("input"));
  document.querySelectorAll("button:not([value=reset])").forEach((button) => button.click());
  once(() => Number(canvas.dataset.triangles) !== before, () => {
    document.title = JSON.stringify({ colours: seen, triangles: before, after: Number(canvas.dataset.triangles),
      words: document.querySelector("output").textContent, wide: document.body.scrollWidth - innerWidth,
      panels: document.querySelector("img").clientWidth });
  }, 2000);
}, 2000);
</script>"""


@pytest.fixture
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    return found


@pytest.mark.parametrize("width", [1200, 390])
def test_the_surface_is_drawn_and_follows_the_slider(browser: str, tmp_path: Path, width: int) -> None:
    box = 40
    line = torch.arange(box) - box // 2.0
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    density = torch.exp(-(x**2 / 60 + y**2 / 30 + z**2 / 20))
    surface = Surface.of_map(density, soft_sphere(box, 15), 2.0, size=48)
    verdict = Verdict("failed", "No result", f"{'/a_folder_with_a_long_name' * 4}: what an error begins with")
    panels = io.BytesIO()  # wider than any screen here
    Image.new("L", (1400, 300)).save(panels, "PNG")
    sections = [Section("The map", body=viewer_html(surface)), Section("Panels", png=panels.getvalue())]
    page = report_html("Run", sections, verdict)
    page = page.replace("</body>", f"{PROBE}</body>")
    (tmp_path / "report.html").write_text(page)
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         f"--window-size={width},900", "--virtual-time-budget=240000", "--dump-dom", f"file://{tmp_path}/report.html"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    seen = json.loads(title.group(1))
    assert seen["colours"] > 50  # shades of a lit surface
    assert seen["triangles"] > 500
    assert 0 < seen["after"] < seen["triangles"]  # a higher contour is smaller
    assert "suggested" in seen["words"]
    assert seen["wide"] <= 0  # nothing to scroll sideways for, but inside of a picture
    assert seen["panels"] > 700  # that many pixels are needed to read its labels
    complaints = [said for said in done.stderr.splitlines() if "CONSOLE" in said and "GPU stall" not in said]
    assert not complaints, complaints
