"""Predicted memory of a training step against what torch's profiler counts on the CPU."""

import pytest
from torch.profiler import ProfilerActivity, profile

from scalecryo.config import config_from_dict
from scalecryo.model.autoencoder import build_autoencoder
from scalecryo.train.stages.gradient_descent import build_optimiser
from tests.unit.test_hot_path import inputs, step
from tools.step_memory import step_memory


def measured_peak(box: int, batch: int) -> int:
    """Tensors that stand before a step, and the most that the step adds."""
    config = config_from_dict({"pose": {"source": "encoder"}, "encoder": {"network": "cnn"}})
    model, particles = build_autoencoder(config, box, batch), inputs("cpu", box, batch)
    optimiser = build_optimiser(config, model)

    def once() -> None:
        for made in ("transforms", "ctf"):
            particles.__dict__.pop(made, None)
        optimiser.zero_grad(set_to_none=True)
        step(model, particles)
        optimiser.step()

    once()
    optimiser.zero_grad(set_to_none=True)
    moments = [value for state in optimiser.state.values() for value in state.values()]
    standing = [*model.parameters(), *model.buffers(), *moments, particles.real]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        once()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most + sum(tensor.numel() * tensor.element_size() for tensor in standing)


@pytest.mark.parametrize(("box", "batch"), [(32, 2), (32, 32), (64, 16)])
def test_prediction_covers_what_a_step_takes(box: int, batch: int):
    # Not all that is counted stands at the same moment: gradients of weights appear as activations go.
    assert 1 < step_memory(box, batch).peak / measured_peak(box, batch) < 1.25


def test_box_400_at_padding_2_fits_24_gb():
    # With a quarter for workspaces, and 2 GB for the context and the allocator's reserve.
    assert 1.25 * step_memory(400, 32, padding=2.0).peak + 2e9 < 24e9
