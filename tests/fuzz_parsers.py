"""Every reader of a file or text that a user may bring; images have a test of their own."""

from __future__ import annotations

from fuzz_parser import Parser
from fuzz_parsers_files import FILES
from fuzz_parsers_run import RUN

PARSERS: tuple[Parser, ...] = (*RUN, *FILES)
"""`study.db` has a test of its own too."""
