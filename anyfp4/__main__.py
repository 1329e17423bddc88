"""``python -m anyfp4``: the command line."""

from anyfp4.entrypoints.cli import main

if __name__ == "__main__":
    main()
