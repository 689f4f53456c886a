"""`python -m tasks.search`."""

from tasks.search.command import main

main()
