"""`python -m runtime.native`: compiles the native merge operator for this machine."""

import sys

from runtime.native import main

if __name__ == "__main__":
    sys.exit(main())
