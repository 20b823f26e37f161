# SPDX-License-Identifier: MIT
"""HTTPS with real certificates and a real client."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import ipaddress
import logging
import os
import socket
import ssl
import threading
import warnings
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from uvicorn.server import ServerState

from candle_vllm.server.bench.client import Target, WholeClient
from candle_vllm.server.cli import main
from candle_vllm.server.http import tls
from candle_vllm.server.http.protocol import TLS_PART, http_protocol
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import until

Issuer = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def issue(folder: Path, name: str, issuer: Issuer | None = None, password: bytes | None = None) -> Issuer:
    """A certificate for 127.0.0.1 and its key as NAME.pem and NAME.key; without an issuer, an authority.

    It has the extensions that RFC 5280 demands: Python 3.13 and later refuse certificates without them.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    signer = key if issuer is None else issuer[1]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if issuer is None:
        others = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
            **others,
        )
        builder = builder.add_extension(usage, critical=True)
    certificate = builder.sign(signer, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    return certificate, key


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    authority = issue(folder, "authority")
    issue(folder, "server", authority)
    issue(folder, "client", authority)
    issue(folder, "stranger", issue(folder, "elsewhere"))
    issue(folder, "locked", authority, password=b"word")
    (folder / "text.pem").write_text("no certificate")
    return folder


def serving(files: Path, **more: object) -> Settings:
    given = {"ssl_certfile": files / "server.pem", "ssl_keyfile": files / "server.key", "port": 0, **more}
    return Settings(**given)  # type: ignore[arg-type]


def trusting(files: Path, certificate: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(files / "authority.pem"))
    if certificate:
        context.load_cert_chain(files / f"{certificate}.pem", files / f"{certificate}.key")
    return context


def test_a_real_client_checks_the_certificate(files: Path) -> None:
    running = Running(PacedEngine(["Hel", "lo"]), serving(files, api_key=("key",)))
    try:
        http = openai.DefaultHttpxClient(trust_env=False, verify=trusting(files))
        with openai.OpenAI(base_url=running.url + "/v1", api_key="key", max_retries=0, http_client=http) as client:
            stream = client.chat.completions.create(
                model="scripted", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello"
        with httpx.Client(trust_env=False) as stranger, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY"):
            stranger.get(running.url + "/health")
        with httpx.Client(trust_env=False) as plain, pytest.raises(httpx.TransportError):
            plain.get(running.url.replace("https", "http") + "/health")
        old = trusting(files)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with httpx.Client(trust_env=False, verify=old) as client:
            assert client.get(running.url + "/health").status_code == 200
    finally:
        running.stop()


def test_ps_trusts_the_servers_own_certificate_alone(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running = Running(PacedEngine(), serving(files))
    try:
        for name, status, told in (
            ("server.pem", 0, "scripted"), ("stranger.pem", 2, "CERTIFICATE_VERIFY_FAILED"),
            ("gone.pem", 2, "cannot be used"), ("text.pem", 2, "text.pem cannot be used"),
        ):  # fmt: skip
            found = main(["ps", "--port", str(running.port), "--ssl-certfile", str(files / name)])
            written = capsys.readouterr()
            assert (found, told in written.out + written.err) == (status, True), written
    finally:
        running.stop()


async def test_a_large_answer_waits_until_the_client_reads(files: Path) -> None:
    size, sent = 32 << 20, asyncio.Event()

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": b"ab" * (size // 2)})
        sent.set()

    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    made, state, loop = http_protocol(), ServerState(), asyncio.get_running_loop()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files / "server.pem", files / "server.key")
    server = await loop.create_server(
        lambda: made(config=config, server_state=state, app_state={}),  # type: ignore[call-arg]
        "127.0.0.1", 0, ssl=context,
    )  # fmt: skip
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2], ssl=trusting(files))
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(0.3)
    assert not sent.is_set()
    (connection,) = state.connections
    assert connection.transport.get_write_buffer_size() < 3 * TLS_PART
    assert await reader.readexactly(size) == b"ab" * (size // 2)
    await asyncio.wait_for(sent.wait(), 60)
    writer.close()
    server.close()


def test_a_server_is_measured_over_https(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    running = Running(PacedEngine("abc"), serving(files, api_key=("key",)))
    line = ["bench", "serve", "--base-url", running.url, "--api-key", "key", "--num-prompts", "2", "--input-len", "5"]
    try:
        assert main(line) == 2
        assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err
        assert main([*line, "--model", "scripted"]) == 2  # nor is a token counted there
        assert main([*line, "--insecure"]) == 0
        monkeypatch.setenv("SSL_CERT_FILE", str(files / "authority.pem"))  # where this machine's authorities are
        assert main(line) == 0
        assert "Successful requests:                     2" in capsys.readouterr().out
    finally:
        running.stop()


@pytest.mark.parametrize("secure", [True, False])
def test_a_client_that_measures_leaves_no_connection_to_the_collector(files: Path, secure: bool) -> None:
    """Neither where its peer does not agree to the end of TLS, nor where the peer leaves a part of a request unread."""
    context, over = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), threading.Event()
    context.load_cert_chain(files / "server.pem", files / "server.key")

    def answer() -> None:
        connection, _ = listener.accept()
        with context.wrap_socket(connection, server_side=True) if secure else connection as peer:
            assert peer.recv(1 << 16)
            peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            over.wait(60)

    async def ask() -> None:
        target = Target(f"http{'s' if secure else ''}://127.0.0.1:{listener.getsockname()[1]}", insecure=True)
        client = WholeClient(target.post("/", {"text": "" if secure else "x" * (32 << 20)}))
        await target.send(client)
        await client.done
        assert client.whole()

    with socket.create_server(("127.0.0.1", 0)) as listener, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        peer = threading.Thread(target=answer)
        peer.start()
        try:
            asyncio.run(ask())
            gc.collect()
        finally:
            over.set()
            peer.join()
    assert [str(each.message) for each in told] == []


def test_clients_show_certificates_where_they_have_to(files: Path) -> None:
    running = Running(PacedEngine(["a"]), serving(files, ssl_ca_certs=files / "authority.pem", ssl_cert_reqs=2))
    try:
        with httpx.Client(trust_env=False, verify=trusting(files, "client")) as client:
            assert client.get(running.url + "/health").status_code == 200
        for certificate in ("", "stranger"):
            context = trusting(files, certificate)
            with httpx.Client(trust_env=False, verify=context) as client, pytest.raises(httpx.TransportError):
                client.get(running.url + "/health")
    finally:
        running.stop()


def test_the_address_is_https(files: Path) -> None:
    assert serving(files).address.url == "https://127.0.0.1:0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssl_certfile": "gone.pem"}, "cannot read .*gone.pem"),
        ({"ssl_keyfile": "gone.key"}, "cannot read .*gone.key"),
        ({"ssl_keyfile": "client.key"}, "cannot be used: the key belongs to another certificate"),
        ({"ssl_keyfile": None}, "the private key is missing .ssl_keyfile names its file"),
        ({"ssl_certfile": "text.pem"}, "ssl_certfile .*text.pem with the key .* cannot be used: a file is not PEM"),
        ({"ssl_certfile": "server.key"}, "cannot be used: .* the certificate or the private key is missing"),
        ({"ssl_certfile": "locked.pem", "ssl_keyfile": "locked.key"}, "cannot be used"),
        ({"ssl_ca_certs": "text.pem"}, "ssl_ca_certs .*text.pem cannot be used: it has no certificate in PEM form$"),
        ({"ssl_ca_certs": "server.key"}, "server.key cannot be used: it has no certificate in PEM form$"),
        ({"ssl_cert_reqs": 2}, "needs ssl_ca_certs"),
        ({"ssl_ciphers": "NONE-SUCH"}, "names no cipher"),
        ({"ssl_certfile": None}, "ssl_keyfile is for HTTPS, which needs a certificate"),
    ],
)
def test_wrong_files_are_named_before_anything_starts(files: Path, changes: dict[str, object], message: str) -> None:
    paths = {
        name: files / value if isinstance(value, str) and name != "ssl_ciphers" else value
        for name, value in changes.items()
    }
    with pytest.raises(UsageError, match=message):
        tls.tls_context(serving(files, **paths))


def test_a_certificate_that_was_replaced_is_read_again(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.01)
    for name in ("server.pem", "server.key"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    settings = Settings(ssl_certfile=tmp_path / "server.pem", ssl_keyfile=tmp_path / "server.key")
    context = tls.tls_context(settings)
    assert context is not None

    def shown() -> bytes:
        """The certificate that a client is shown."""
        ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
        client_context = ssl.create_default_context()
        client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
        server = context.wrap_bio(theirs, ours, server_side=True)
        client = client_context.wrap_bio(ours, theirs)
        for _ in range(4):
            for side in (client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        return client.getpeercert(binary_form=True) or b""

    async def replaced(certificate: str, key: str, word: str) -> None:
        task = asyncio.create_task(tls.refresh(context, settings))
        await asyncio.sleep(0.03)
        for name, source in (("server.key", key), ("server.pem", certificate)):
            (tmp_path / f"{name}.new").write_bytes((files / source).read_bytes())
            os.replace(tmp_path / f"{name}.new", tmp_path / name)
        await until(lambda: word in caplog.text)
        task.cancel()

    first = shown()
    with caplog.at_level(logging.INFO):
        asyncio.run(replaced("client.pem", "client.key", "was read again"))
        second = shown()
        asyncio.run(replaced("text.pem", "client.key", "stays in use"))
        (tmp_path / "server.pem").write_bytes((files / "server.pem").read_bytes())  # its key follows later
        with pytest.raises(UsageError, match="the key belongs to another certificate"):
            tls.load_chain(context, settings)
    assert first != second
    assert shown() == second


def test_paths_may_have_the_prefix_of_a_proxy() -> None:
    running = Running(PacedEngine(["a"]), Settings(port=0, root_path="/models/a", api_key=("key",)))
    try:
        with running.http() as client:
            for path in ("/v1/models", "/models/a/v1/models"):
                assert client.get(path).status_code == 401, path
                assert client.get(path, headers={"authorization": "Bearer key"}).status_code == 200, path
            assert client.get("/models/a/health").status_code == 200
            assert client.get("/models/b/v1/models", headers={"authorization": "Bearer key"}).status_code == 404
            document = client.get("/models/a/openapi.json", headers={"authorization": "Bearer key"}).json()
            assert document["servers"] == [{"url": "/models/a"}]
    finally:
        running.stop()
