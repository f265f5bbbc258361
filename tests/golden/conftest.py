"""Golden values."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--write-golden", action="store_true", help="store what the tests compute as golden")
