"""`python -m moonlight.cli`: the `moonlight` command."""

from moonlight.cli.main import main

main()
