"""What is installed for the tests is what docs/serving.md says."""

from __future__ import annotations

from tests.support.served_encoders import DOCUMENT
from tests.support.serving_environment import described


def test_the_document_names_the_versions_that_are_run() -> None:
    said = DOCUMENT.read_text(encoding="utf-8")
    vllm, infinity = described("vllm"), described("infinity")
    assert f"vLLM {vllm['install'][0][0].partition('==')[2]} on a CPU" in said
    assert f"pip uninstall {' '.join(vllm['remove'])}" in said
    for packages in infinity["install"]:
        for package in packages:
            assert package in said or package.startswith("torch=="), package
