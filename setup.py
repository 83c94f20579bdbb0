"""Two import packages from one distribution: `llm2vec_ds` and, from `kernels/`, `llm2vec_kernels`.

All metadata is in pyproject.toml. `kernels/` itself is no package: a package of that name would
shadow PyPI's `kernels`, which transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["llm2vec_ds", "llm2vec_ds.*"]) + find_packages("kernels"),
    package_dir={"llm2vec_ds": "llm2vec_ds", "llm2vec_kernels": "kernels/llm2vec_kernels"},
    package_data={"llm2vec_ds": ["assets/*", "py.typed"], "llm2vec_kernels": ["py.typed"]},
)
