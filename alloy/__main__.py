"""The command `alloy`, which `python -m alloy` is too."""

import sys

from alloy.startup import collect_rarely


def main() -> None:
    collect_rarely()
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError:
        sys.exit("alloy: the command needs Typer: pip install 'alloy-merge[cli]'")
    from alloy.cli.app import app

    app()


if __name__ == "__main__":
    main()
