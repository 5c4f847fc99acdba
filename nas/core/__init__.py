"""Configuration, command lines, requirements, files, tables and statistics; no torch."""
