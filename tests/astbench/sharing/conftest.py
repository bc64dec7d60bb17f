"""A hub in this process that the client talks to instead of the real one."""

import huggingface_hub.constants as constants
import pytest

from tests.astbench.sharing.fake_hub import FakeHub


@pytest.fixture(scope="session")
def server():
    """One for all tests: transformers keeps the address that it talked to first."""
    with FakeHub() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    server.empty()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    return server
