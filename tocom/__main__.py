"""`python -m tocom`: the command."""

from tocom.export.cli.__main__ import main

if __name__ == "__main__":
    main()
