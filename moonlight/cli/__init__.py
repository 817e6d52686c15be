"""The `moonlight` command, one module a group of commands."""
