"""Everything is in pyproject.toml; this file is where the native library of csrc/ joins the build."""

from setuptools import setup

setup()
