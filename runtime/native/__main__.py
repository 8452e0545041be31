"""`python -m tocom.runtime.native`: compiles the native merge operator for this machine."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
