# SPDX-License-Identifier: Apache-2.0
"""
Plain `pip install .` of the part of the package that needs no ROS.

What it is comes from package.xml, what it needs from pyproject.toml; nothing is said here again.
The node and its messages are built by `colcon build` instead.
"""

from pathlib import Path
from xml.etree import ElementTree

from setuptools import setup

PACKAGE = ElementTree.parse(Path(__file__).parent / 'package.xml').getroot()


def fact(tag: str) -> str:
    """Return the text of an element of package.xml."""
    text = PACKAGE.findtext(tag)
    if not text:
        raise ValueError(f'package.xml has no <{tag}>')
    return text


setup(version=fact('version'), description=fact('description'), license=fact('license'))
