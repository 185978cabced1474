"""Recipes: the settings' names are those of the stages' lists, and every stage keeps to the protocol."""

import inspect

from scalecryo import config
from scalecryo.train.recipes import RECIPES
from scalecryo.train.stage import Stage
from scalecryo.train.stages.final_pass import FinalPass


def test_every_recipe_of_the_settings_has_stages() -> None:
    assert set(RECIPES) == set(config.RECIPES)
    assert all(makers[-1] is FinalPass for makers in RECIPES.values())


def test_stages_keep_to_the_protocol() -> None:
    methods = [name for name, _ in inspect.getmembers(Stage, inspect.isfunction) if not name.startswith("_")]
    assert {"request", "step", "finish_pass", "done", "state_dict", "load_state_dict"} <= set(methods)
    stages = {maker for makers in RECIPES.values() for maker in makers}
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names), "a checkpoint says by name where a run stands"
    for stage in stages:
        for method in methods:
            wanted, found = (list(inspect.signature(getattr(owner, method)).parameters) for owner in (Stage, stage))
            assert wanted == found, f"{stage.__name__}.{method}"
