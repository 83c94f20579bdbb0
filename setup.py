"""Two import packages from one distribution: `llm2vec_ds` and, from `kernels/`, `llm2vec_kernels`.

All metadata is in pyproject.toml. `kernels/` itself is no package: a package of that name would
shadow PyPI's `kernels`, which transformers imports. What `llm2vec-ds init` writes lies at the top of the
repository, and in the wheel below `llm2vec_ds/start/`.
"""

from setuptools import find_packages, setup

SHIPPED = {
    "recipes": ["**/*.yaml", "**/*.json", "**/*.jsonl", "**/*.txt", "**/*.csv"],
    "ds_configs": ["*.json"],
    "slurm": ["*.sh", "*.py", "*.env"],
    "docs": ["recipe_keys.md"],
}

setup(
    packages=[
        *find_packages(include=["llm2vec_ds", "llm2vec_ds.*"]),
        *find_packages("kernels"),
        *(f"llm2vec_ds.start.{name}" for name in SHIPPED),
    ],
    package_dir={
        "llm2vec_ds": "llm2vec_ds",
        "llm2vec_kernels": "kernels/llm2vec_kernels",
        **{f"llm2vec_ds.start.{name}": name for name in SHIPPED},
    },
    package_data={
        "llm2vec_ds": ["assets/*", "py.typed"],
        "llm2vec_kernels": ["py.typed"],
        "llm2vec_ds.start": ["README.md"],
        **{f"llm2vec_ds.start.{name}": patterns for name, patterns in SHIPPED.items()},
    },
)
