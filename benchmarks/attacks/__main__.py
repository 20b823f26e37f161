# SPDX-License-Identifier: MIT
"""`python -m benchmarks.attacks`"""

import sys

from benchmarks.attacks.harness import main

sys.exit(main())
