"""Prints facts about a run on its first node, for the batch shell and for later readers.

    python slurm/run_facts.py RECIPE [key=value …]

The batch shell reads the first lines: `output_dir=…` and `address=…` (this node's, for the other ranks). Then
follow the versions of all packages, the GPUs, and the environment without secrets.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import distributions

try:
    from llm2vec_ds.errors import UserError
    from llm2vec_ds.network import own_address
    from llm2vec_ds.recipe.files import load_recipe
except ModuleNotFoundError as error:
    sys.exit(f"ModuleNotFoundError: {error}")  # the batch shell says what to do about it

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL", re.IGNORECASE)


def main(recipe: str, overrides: list[str]) -> None:
    print(f"output_dir={load_recipe(recipe, overrides).output_dir}")
    print(f"address={own_address(os.environ.get('LLM2VEC_DS_INTERFACE'))}")
    print(f"\n# {sys.executable}, Python {sys.version.split()[0]}")
    for name, version in sorted({(d.metadata["Name"].lower(), d.version) for d in distributions()}):
        print(f"{name}=={version}")
    print("\n# GPUs of the first node")
    print(gpus())
    print("\n# environment")
    for name, value in sorted(os.environ.items()):
        print(f"{name}={'(hidden)' if SECRET.search(name) else value}")


def gpus() -> str:
    try:
        outcome = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return "no nvidia-smi"
    return (outcome.stdout + outcome.stderr).strip()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except UserError as error:
        print(f"llm2vec-ds: error: {error}", file=sys.stderr)
        sys.exit(2)
