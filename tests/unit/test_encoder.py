"""The paper's encoder."""

import copy

import torch
from torch import Tensor

from scalecryo.model.encoder import PoseEncoder


def test_bfloat16_does_not_round_poses() -> None:
    """After the convolutions everything is as in double precision to float32's rounding; bfloat16's is 2⁻⁹ = 2e-3."""
    torch.manual_seed(0)
    encoder = PoseEncoder(32, (8, 16), 64, 2, 8, torch.bfloat16)
    seen: list[Tensor] = []
    encoder.convolutions.register_forward_hook(lambda _module, _inputs, features: seen.append(features))
    found = encoder(torch.randn(4, 32, 32))
    assert seen[0].dtype == torch.bfloat16
    expected = copy.deepcopy(encoder.perceptron).double()(seen[0].double()).reshape(4, 2, 8)
    assert (found.double() - expected).abs().max() < 1e-5 * expected.abs().max()
