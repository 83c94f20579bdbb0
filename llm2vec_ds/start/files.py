"""Copies recipes, DeepSpeed configs, SLURM scripts and the page of recipe keys.

They are for users who have the package but no checkout.

A checkout has them at its top level. For the wheel, setup.py puts the same files beside this module.
"""

from __future__ import annotations

from pathlib import Path

from llm2vec_ds.errors import UserError, writing
from llm2vec_ds.storage.durable import replace_file

FOLDERS = ("recipes", "ds_configs", "slurm")
SUFFIXES = (".yaml", ".json", ".jsonl", ".txt", ".csv", ".sh", ".py", ".env")
README = "README.md"
KEYS = "docs/recipe_keys.md"


def shipped() -> dict[str, Path]:
    """Returns each file by its path relative to the target folder.

    Raises:
        UserError: the installation lacks these files.
    """
    here = Path(__file__).resolve().parent
    for root in (here, here.parents[1]):
        if all((root / name).is_dir() for name in FOLDERS):
            files = (file for name in FOLDERS for file in sorted((root / name).rglob("*")))
            known = {str(f.relative_to(root)): f for f in files if f.suffix in SUFFIXES and f.is_file()}
            return {README: here / README, KEYS: root / KEYS, **known}
    raise UserError("this installation lacks its recipes and scripts: install llm2vec-ds again")


def write_to(folder: Path, *, overwrite: bool = False) -> list[str]:
    """Writes the files that are missing. Returns the paths of the written files, relative to `folder`.

    Raises:
        UserError: a file exists with other content and `overwrite` is False. Nothing is written then. Or a
            file cannot be written.
    """
    contents = {name: file.read_bytes() for name, file in shipped().items()}
    with writing(folder):
        there = {name: (folder / name).read_bytes() for name in contents if (folder / name).exists()}
    changed = [name for name, content in there.items() if content != contents[name]]
    if changed and not overwrite:
        shown = ", ".join(changed[:5]) + (", …" if len(changed) > 5 else "")
        raise UserError(
            f"{folder} holds other content in {shown}: choose another folder, or replace it with --overwrite"
        )
    wanted = [name for name in contents if there.get(name) != contents[name]]
    for name in wanted:
        place = folder / name
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(place, contents[name])
            if shipped_mode := shipped()[name].stat().st_mode & 0o111:
                place.chmod(place.stat().st_mode | shipped_mode)
    return wanted
