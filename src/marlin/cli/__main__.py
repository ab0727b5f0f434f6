"""`python -m marlin.cli`, the same as the `marlin` command."""

from marlin.cli import main

main()
