"""What timm gives for ViTs with the options of published weights."""
import pytest
from small import reference


@pytest.fixture(scope="session")
def timm():
    return reference("timm_options.npz")
