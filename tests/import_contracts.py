# SPDX-License-Identifier: MIT
"""A contract of import-linter's, named in pyproject.toml: the packages that all contracts speak of are there.

It imports `candle_vllm` before the packages are looked for. They are looked for where the spec of `candle_vllm` says,
and until it is imported that knows the folder of the whole distribution alone.
"""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output

import candle_vllm


class FoundContract(Contract):
    """Kept where every one of `packages` has modules in the graph."""

    packages = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        missing = [name for name in self.packages if name not in graph.modules]
        return ContractCheck(kept=not missing, metadata={"missing": missing})

    def render_broken_contract(self, check: ContractCheck) -> None:
        output.print_error(f"{', '.join(check.metadata['missing'])} not found in {list(candle_vllm.__path__)}")
