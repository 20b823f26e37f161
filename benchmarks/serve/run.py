# SPDX-License-Identifier: MIT
"""The server under load, one JSON line per result.

    python benchmarks/serve/run.py load [--streams 1 32 256 1000] [--rate 20] [--seconds 20]
    python benchmarks/serve/run.py load --streams 1000 --minutes 10        memory, every minute
    python benchmarks/serve/run.py library [--streams 32] [--rounds 7] [--engine thread|process] [--m MODEL]
                                            [--client-loop asyncio|uvloop] [--client-read-bytes N]
    python benchmarks/serve/run.py all [--quick]

`load` puts streams of a fixed rate through the server, from an engine that writes the time into every token: `gap_ms`
lies between two tokens of a stream, `delay_ms` between a token's making and its arrival, and
`first_token_above_engine_ms` is what the way in and out adds to a first token while the streams run. All streams have
their token in the same tick, as in a batched step. `library` is the same prompts through `InferenceEngine` and through
HTTP, on one engine and in turns. The clients run on the same machine, and `client_cpu_us_per_token` is what they take
of its cores. `--client-loop uvloop` halves it. With `--client-read-bytes 65536` the system keeps what arrives until so
many bytes are there or the answer has ended: the server sends the same chunks, the clients take much less, and gaps and
first tokens mean nothing. `bars` says which of the project's bars a line meets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import library
import load

MOST_STREAMS = 3000  # below the server's limit on connections
MOST_MINUTES = 60.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=("load", "library", "all"))
    made.add_argument("--streams", type=int, nargs="+", help="default: 1 32 256 1000, of the library 32")
    made.add_argument("--rate", type=float, default=20.0, help="tokens per second of a stream")
    made.add_argument("--seconds", type=float, default=20.0, help="for each number of streams")
    made.add_argument("--minutes", type=float, help="instead of --seconds; memory is read every minute")
    made.add_argument("--formats", action="store_true", help="the paced model may think and call tools")
    made.add_argument("--profile", help="where cProfile writes what it sees of the paced server's event loop")
    made.add_argument("--rounds", type=int, default=7, help="of library and HTTP each")
    made.add_argument("--max-tokens", type=int, default=64, help="of an answer of the model")
    made.add_argument("--engine", choices=("thread", "process"), default="thread")
    made.add_argument("--how", choices=("generate", "stream"), default="generate", help="which call of the library")
    made.add_argument("--client-loop", choices=tuple(library.LOOPS), default="asyncio", help="of the library's clients")
    made.add_argument("--client-read-bytes", type=int, default=1, help="bytes that the library's clients wait for")
    made.add_argument("--m", help="the model; default: the demo model")
    made.add_argument("--quick", action="store_true", help="a few seconds of everything, to see that it runs")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    seconds = 60 * args.minutes if args.minutes else args.seconds
    counts, rounds, tokens = args.streams or [1, 32, 256, 1000], args.rounds, args.max_tokens
    if not (0 < seconds <= 60 * MOST_MINUTES and 0 < args.rate <= 1000 and 0 < rounds <= 100):
        parser().error("out of range: at most 60 minutes, 1000 tokens/s, 100 rounds")
    if not all(0 < count <= MOST_STREAMS for count in counts):
        parser().error(f"--streams must be 1 to {MOST_STREAMS}")
    if args.quick:
        counts, seconds, rounds, tokens = args.streams or [1, 8], min(seconds, 2.0), 1, 8
    if args.what in ("load", "all"):
        extra = (*(("--formats",) if args.formats else ()), *(("--profile", args.profile) if args.profile else ()))
        load.load(counts, args.rate, seconds, extra=extra)
    if args.what in ("library", "all"):
        streams = counts if args.what == "library" and args.streams else [8 if args.quick else 32]
        for count in streams:
            library.run(
                count,
                tokens,
                rounds,
                engine=args.engine,
                model=args.m,
                how=args.how,
                loop=args.client_loop,
                read_bytes=args.client_read_bytes,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
