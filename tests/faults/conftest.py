"""The small data set and configuration of the integration tests."""

from tests.integration.conftest import config as config
from tests.integration.conftest import shapes as shapes
