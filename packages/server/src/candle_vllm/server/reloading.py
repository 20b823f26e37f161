# SPDX-License-Identifier: MIT
"""Read models.yaml, `.env` and the files of API keys again while the server runs.

Not a step of a request's life: happens on SIGHUP, or by an operator's request. If a file is invalid, its previous
content stays in use, and the log says where the error is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from candle_vllm.core.errors import CandleVllmError, ConfigError
from candle_vllm.server.http.keys import Keyring
from candle_vllm.server.models.manager import Changes, ModelManager
from candle_vllm.server.models.slot import ModelSlot
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.configuration import Configuration
from candle_vllm.server.settings.derived import engine_config, refuse_wrong_settings
from candle_vllm.server.settings.options import MODEL, UsageError
from candle_vllm.server.settings.table import OPTIONS

logger = logging.getLogger(__name__)


class Reloader:
    """Reads the settings files of one server again; `configuration` is the one at the server's start."""

    def __init__(self, configuration: Configuration, manager: ModelManager, keys: Keyring) -> None:
        self._configuration = configuration
        self._manager = manager
        self._keys = keys
        self._lock = asyncio.Lock()

    async def reload(self) -> None:
        """Read all files again; what was read, and errors, are logged."""
        old, new = self._configuration, None
        try:
            new = None if old.again is None else await asyncio.to_thread(old.again)
            if old.in_file:
                await self.reload_models()
            elif new is not None:
                _log_later(old, new)
                logger.info("read the settings again; there is no models.yaml")
        except CandleVllmError as error:
            logger.error("%s; the models stay as they were", error)
        await self._keys.reload(None if new is None else new.settings)
        given = [] if new is None else [source.title for source in new.sources if "api_key" in source.values]
        if given and not given[0].endswith(".env"):
            logger.info("the API key of %s stays until the next start: put keys that change into a file", given[0])

    async def reload_models(self) -> Changes:
        """Read models.yaml again and serve its models; models that were added at run time stay.

        UsageError if the file is invalid or missing; then nothing has changed.
        """
        async with self._lock:
            old = self._configuration
            new = await asyncio.to_thread(_read_again, old)
            known = {entry.name for entry in old.catalogue.entries}
            others = [slot.entry for name, slot in self._manager.slots.items() if name not in known]
            changes = self._manager.adopt(Catalogue([*new.catalogue.entries, *others], new.catalogue.default.name))
            self._configuration = new
        for remark in new.remarks:
            if remark not in old.remarks:
                logger.warning("%s", remark)
        _log_later(old, new)
        warn_of_missing(new.catalogue)
        told = ", ".join(f"{word} {', '.join(names)}" for word, names in asdict(changes).items() if names)
        logger.info("read %s again: %s", new.models_file, told or "nothing has changed")
        return changes

    async def add(self, section: Mapping[str, Any]) -> ModelSlot:
        """Serve one more model until the server ends; `section` has the form of an entry of `models` in models.yaml.

        UsageError if the entry is invalid, another model has its name, or this server accepts no new models.
        """
        async with self._lock:
            remarks: list[str] = []
            entry = await asyncio.to_thread(_entry, self._configuration, section, remarks)
            self._manager.change(None, entry)
        for remark in remarks:
            logger.warning("%s", remark)
        logger.info("the model %s was added", entry.name)
        return self._manager.slots[entry.name]

    async def remove(self, name: str) -> Changes:
        """Stop serving a model, after its running requests.

        ModelNotServedError if no model has this name; UsageError for the default or the active model.
        """
        async with self._lock:
            entry = self._manager.find(name, exact=True).entry
            if entry.name in (self._manager.catalogue.default.name, self._manager.active):
                raise UsageError(f"the model {entry.name!r} is the default model, which cannot be removed")
            changes = self._manager.change(entry, None)
        logger.info("the model %s was removed", entry.name)
        return changes

    def listen(self, stop: Callable[[], object]) -> None:
        """Read all files again on SIGHUP, in the running loop; if the terminal was closed, call `stop` instead."""
        if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
            return  # Windows has no such signal, and only the main thread may handle one
        had_terminal, tasks = _has_terminal(), set[asyncio.Task[None]]()

        def hung_up() -> None:
            if had_terminal and not _has_terminal():  # a terminal that is closed ends its programs
                stop()
                return
            task = asyncio.ensure_future(self.reload())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up)


def _entry(configuration: Configuration, section: Mapping[str, Any], remarks: list[str]) -> ModelEntry:
    if configuration.entry_of is None:
        raise UsageError("models cannot be added to this server")
    entry = configuration.entry_of(section, remarks)
    _check_formats(entry, "the request")
    return entry


def _check_formats(entry: ModelEntry, where: object) -> None:
    try:
        refuse_wrong_settings(entry.settings)
    except ConfigError as error:
        raise UsageError(f"model {entry.name!r} of {where}: {error}") from None


def _read_again(old: Configuration) -> Configuration:
    if not old.in_file or old.again is None:
        raise UsageError("this server serves no models.yaml")
    new = old.again()
    if new.models_file != old.models_file:
        raise UsageError(f"{old.models_file} no longer exists")
    if not new.in_file:
        raise UsageError(f"{new.models_file}: the model that the server was started with (--m) is no longer in it")
    for entry in new.catalogue.entries:
        _check_formats(entry, new.models_file)
    return new


def _log_later(old: Configuration, new: Configuration) -> None:
    """Log which settings, and whether the mailbox, have changed and take effect at the next start only."""
    names = [each.name for each in OPTIONS if not old.in_file or (not each.in_yaml and each.group != MODEL)]
    changed = [name for name in names if getattr(old.settings, name) != getattr(new.settings, name)]
    if old.mailbox != new.mailbox and "mailbox" not in changed:
        changed.append("mailbox")
    for name in changed:
        if name not in ("api_key", "management_key"):  # the keyring has replaced them
            titles = (source.title for each in (new, old) for source in each.sources if name in source.values)
            logger.warning("%s in %s takes effect at the next start", name, next(titles, new.models_file))


def _has_terminal() -> bool:
    return any(os.isatty(number) for number in (0, 1, 2))


def warn_of_missing(catalogue: Catalogue) -> threading.Thread | None:
    """Warn of missing or unreadable model files, before a client asks for the model.

    Return the thread that reads the headers of existing files, or None without such files. The default model's file is
    not among them, because the server loads it at the start.
    """
    there: list[ModelEntry] = []
    for entry in catalogue.entries:
        model = entry.settings.model or ""
        is_path = (model.endswith(".gguf") and ":" not in model) or Path(model).is_absolute()
        if is_path and not os.path.exists(os.path.expanduser(model)):
            logger.warning("the model %s cannot be loaded: there is no %s", entry.name, model)
        elif is_path and entry is not catalogue.default:
            there.append(entry)
    if not there:
        return None
    thread = threading.Thread(target=warn_of_unreadable, args=(there,), name="model-headers", daemon=True)
    thread.start()
    return thread


def warn_of_unreadable(entries: Sequence[ModelEntry]) -> None:
    """Warn of models whose files have headers that cannot be read."""
    from candle_vllm.core.assembly.opening import open_model
    from candle_vllm.core.devices import CPU
    from candle_vllm.core.loading.source import model_files

    for entry in entries:
        try:
            open_model(model_files(engine_config(entry.settings, offline=True)), CPU).checkpoint.close()
        except (CandleVllmError, OSError) as error:
            logger.warning("the model %s cannot be loaded: %s", entry.name, error)
