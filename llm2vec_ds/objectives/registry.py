"""Which objective trains which stage of a recipe."""

from __future__ import annotations

from llm2vec_ds.objectives.base import Objective
from llm2vec_ds.objectives.contrastive.simcse import Simcse
from llm2vec_ds.objectives.contrastive.supervised import Supervised
from llm2vec_ds.objectives.distillation.objective import Distillation
from llm2vec_ds.objectives.mntp.objective import Mntp
from llm2vec_ds.objectives.score_distillation.objective import ScoreDistillation
from llm2vec_ds.recipe.objectives import SECTIONS
from llm2vec_ds.recipe.recipe import Recipe

OBJECTIVES: dict[str, Objective] = {
    "mntp": Mntp(),
    "simcse": Simcse(),
    "supervised": Supervised(),
    "distil": Distillation(),
    "distil_scores": ScoreDistillation(),
}


def register(stage: str, objective: Objective) -> None:
    """Adds a stage: recipes with `stage: NAME` then train with `objective` and have its section as `NAME`.

    Raises:
        ValueError: the name is taken.
    """
    if stage in SECTIONS:
        raise ValueError(f"stage {stage!r} already has an objective: choose another name")
    SECTIONS[stage] = objective.section
    OBJECTIVES[stage] = objective


def objective_of(recipe: Recipe) -> Objective:
    return OBJECTIVES[recipe.stage]
