"""Prints the model of a recipe, for the batch shell.

python slurm/recipe_model.py RECIPE [key=value …]
"""

from __future__ import annotations

import sys

try:
    from llm2vec_ds.errors import UserError
    from llm2vec_ds.recipe.files import load_recipe
except ModuleNotFoundError as error:
    sys.exit(f"ModuleNotFoundError: {error}")  # the batch shell says what to do about it

if __name__ == "__main__":
    try:
        print(load_recipe(sys.argv[1], sys.argv[2:]).model.path)
    except UserError as error:
        print(f"llm2vec-ds: error: {error}", file=sys.stderr)
        sys.exit(2)
