"""What several files of this folder compare with."""

import pytest


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The workdir of a toy run that nothing disturbed."""
    from toy import assemble_toy, toy_config, train

    workdir = tmp_path_factory.mktemp("clean") / "run"
    assert train(toy_config(), assemble_toy, workdir)
    return workdir
