"""What pyproject.toml cannot say: two folders of the checkout are packages inside `imagereward_jax` once installed."""

from setuptools import find_packages, setup

BESIDE = ("configs", "convert")

setup(
    packages=[*find_packages(include=["imagereward_jax*"]), *(f"imagereward_jax.{name}" for name in BESIDE)],
    package_dir={f"imagereward_jax.{name}": name for name in BESIDE},
)
