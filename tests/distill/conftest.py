"""The small text of the loop's tests."""

from tests.test_train import text  # noqa: F401
