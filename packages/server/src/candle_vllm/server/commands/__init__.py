# SPDX-License-Identifier: MIT
"""The commands besides `serve`; they call the engine in this process, without HTTP."""
