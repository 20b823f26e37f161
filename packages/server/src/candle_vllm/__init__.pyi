# SPDX-License-Identifier: MIT
"""For type checkers of a checkout, to which this folder is a part of the package in `src`; not in the wheel."""
