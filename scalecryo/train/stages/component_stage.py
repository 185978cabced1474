"""What the stages that follow the components share: passes that are made anew, not taken up."""

from collections.abc import Mapping
from typing import Any

from scalecryo.train.component_model import ComponentModel
from scalecryo.train.particle_source import RunContext
from scalecryo.train.stage import Learned


class ComponentStage:
    """Base of passes with components that were learnt before; what they find lies in parts, not in a checkpoint."""

    def __init__(self, context: RunContext, learned: Learned) -> None:
        self._context, self._learned = context, learned

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the pass is made anew."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""

    @property
    def _model(self) -> ComponentModel:
        assert self._learned.components is not None, "the components come first"
        return self._learned.components
