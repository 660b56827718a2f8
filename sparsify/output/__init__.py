"""Writes files, tables and progress bars. Imports only `errors`."""
