# SPDX-License-Identifier: MIT
"""Contract of import-linter, named in pyproject.toml: the packages that the contracts name exist.

This module imports `candle_vllm` before import-linter searches the packages. It searches in the folders of
`candle_vllm`'s import spec, which before the import contains only the folder of the whole distribution.
"""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output

import candle_vllm


class FoundContract(Contract):
    """Contract that is kept if each of `packages` has modules in the graph."""

    packages = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        missing = [name for name in self.packages if name not in graph.modules]
        return ContractCheck(kept=not missing, metadata={"missing": missing})

    def render_broken_contract(self, check: ContractCheck) -> None:
        output.print_error(f"{', '.join(check.metadata['missing'])} not found in {list(candle_vllm.__path__)}")
