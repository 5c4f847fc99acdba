"""Every reader of a file or text that a user may bring; images have a test of their own."""

from __future__ import annotations

from benchmarks._parser import Parser
from benchmarks._parsers_files import FILES
from benchmarks._parsers_run import RUN

PARSERS: tuple[Parser, ...] = (*RUN, *FILES)
"""`study.db` has a test of its own too."""
