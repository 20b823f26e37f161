# SPDX-License-Identifier: MIT
"""HTTPS: load certificate and key into a TLS context, and with --enable-ssl-refresh again when the files change.

Below step 1 of a request's life.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl

from candle_vllm.server.http.keys import file_state
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import ListenerOptions

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # seconds between two checks of the files


def tls_context(settings: ListenerOptions) -> ssl.SSLContext | None:
    """Return the context for TLS 1.2 and later with the operator's files, or None for a server without TLS.

    Raises:
        UsageError: a file or ssl_ciphers cannot be used, or a setting needs another one that is not set.
    """
    if settings.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers", "enable_ssl_refresh"):
            if getattr(settings, name):
                raise UsageError(f"{name} is for HTTPS, which needs a certificate: set ssl_certfile as well")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_chain(context, settings)
    if settings.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(settings.ssl_ca_certs)
        except OSError as error:
            reason = _reason(error, "it has no certificate in PEM form")
            raise UsageError(f"ssl_ca_certs {settings.ssl_ca_certs} cannot be used: {reason}") from None
    elif settings.ssl_cert_reqs:
        raise UsageError("ssl_cert_reqs needs ssl_ca_certs, the clients' CA certificates")
    context.verify_mode = ssl.VerifyMode(settings.ssl_cert_reqs)
    if settings.ssl_ciphers is not None:
        try:
            context.set_ciphers(settings.ssl_ciphers)
        except ssl.SSLError:
            raise UsageError(f"ssl_ciphers {settings.ssl_ciphers!r:.60} names no cipher that OpenSSL has") from None
    return context


def load_chain(context: ssl.SSLContext, settings: ListenerOptions) -> None:
    """Load certificate and key; if that raises a UsageError, the previous ones stay in use."""
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    assert certificate is not None
    try:
        # First into another context: OpenSSL drops the previous key before it refuses a key of another certificate.
        for each in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
            # A key with a password is refused; without this function, OpenSSL would ask for it at the terminal.
            each.load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:
        for path in (certificate, key):
            if path is not None and not os.access(path, os.R_OK):
                raise UsageError(f"cannot read {path}") from None
        files = f"{certificate}" + (f" with the key {key}" if key else "")
        # How OpenSSL reports these cases differs from version to version.
        cases = "a file is not PEM, the certificate or the private key is missing (ssl_keyfile names its file), or "
        reason = _reason(error, cases + "the key has a password")
        raise UsageError(f"ssl_certfile {files} cannot be used: {reason}") from None


def _reason(error: OSError, otherwise: str) -> str:
    if not isinstance(error, ssl.SSLError):
        return error.strerror or "it cannot be read"
    return "the key belongs to another certificate" if error.reason == "KEY_VALUES_MISMATCH" else otherwise


async def refresh(context: ssl.SSLContext, settings: ListenerOptions) -> None:
    """Load certificate and key again when one of the files has changed; later connections use them."""
    paths = [path for path in (settings.ssl_certfile, settings.ssl_keyfile) if path is not None]
    known = [file_state(path) for path in paths]
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if (found := [file_state(path) for path in paths]) == known:
            continue
        try:
            load_chain(context, settings)
        except UsageError as error:
            logger.warning("the old certificate stays in use: %s", error)
        else:
            logger.info("the certificate was read again")
        known = found
