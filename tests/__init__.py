"""Tests, in folders named after the packages they test."""

import pytest

pytest.register_assert_rewrite("tests.support")  # so a failed assertion in a helper shows its values
