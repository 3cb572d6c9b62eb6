"""Seeds of the parts of a run that draw at random, none of them private noise or sampling."""

from dpfast.recipes.schema import Recipe

SEEDS = {
    "model": 0,
    "public data": 1,
    "pretrain": 2,
    "private": 3,
    "sample": 4,
    "classifier": 5,
    "baseline": 6,
    "sweep": 7,
}


def seed_for(recipe: Recipe, part: str) -> int:
    """The seed of one part of the run."""
    return recipe.seed * 1000 + SEEDS[part]
