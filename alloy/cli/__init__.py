"""The command line over the library: arguments in, answers out, errors in its own words.

`app` holds the commands, `adapters`, `merging`, `symmetry` and `distances` some each, `wording`
turns messages that speak of Python arguments into messages that speak of options. Needs Typer.
"""
