# SPDX-License-Identifier: MIT
"""Commands besides `serve`; they call the engine in this process, without HTTP."""
