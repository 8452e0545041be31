"""`python -m runtime.native`: compiles the native merge operator for this machine."""

import sys

from runtime.native import main

sys.exit(main())
