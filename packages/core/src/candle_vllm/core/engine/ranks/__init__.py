# SPDX-License-Identifier: MIT
"""Divide a model among processes, devices and machines."""
