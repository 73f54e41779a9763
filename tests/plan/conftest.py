"""The small model of the learner's tests."""

from tests.train.conftest import config, make_example, make_image  # noqa: F401
