"""Tests. A failed assertion of what they share shows its values, as one of a test file does."""

import pytest

pytest.register_assert_rewrite("tests.support")
