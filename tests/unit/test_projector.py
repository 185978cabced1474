"""Points for TensorBoard's embedding projector, as TensorBoard itself finds and serves them."""

from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from torch.utils.tensorboard import SummaryWriter

from scalecryo.runs.folder import RunFolder
from scalecryo.runs.projector import MOST_POINTS, write_points


def test_tensorboard_finds_the_points(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "run" / "tb")) as writer:
        writer.add_scalar("any", 1.0, 0)
    run, count = RunFolder(str(tmp_path / "run")), 2 * MOST_POINTS + 1
    points = np.linspace(0, 1, 2 * count).reshape(count, 2)
    for _ in range(2):  # an assignment writes them anew
        write_points(run, "views", points[:7], {"row": np.arange(7), "confidence": np.full(7, 0.25)})
        write_points(run, "components", points, {"row": np.arange(count), "state": np.ones(count, dtype=int)})
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    plugin = ProjectorPlugin(TBContext(logdir=str(tmp_path), multiplexer=multiplexer, data_provider=provider))
    plugin._update_configs()
    (config,) = plugin._configs.values()
    assert [one.tensor_name for one in config.embeddings] == ["components", "views"]
    folder = tmp_path / "run" / "tb"
    shown = np.loadtxt(folder / config.embeddings[0].tensor_path)
    np.testing.assert_allclose(shown[[0, -1]], points[[0, -1]], atol=1e-5)  # five digits
    assert shown.shape == (MOST_POINTS, 2)
    lines = (folder / config.embeddings[0].metadata_path).read_text().splitlines()
    assert lines[0] == "row\tstate"
    assert len(lines) == MOST_POINTS + 1
    assert lines[-1] == f"{count - 1}\t1"
    assert (folder / config.embeddings[1].metadata_path).read_text().splitlines()[1] == "0\t0.25"
