# SPDX-License-Identifier: MIT
"""Run a module as on another system: `elsewhere.py win32|darwin MODULE [ARGUMENTS]`, or `-c CODE`.

Only our own packages are affected. They import stand-ins of the standard library's modules, with that system's
`sys.platform` and without the names that the system lacks. Modules that it lacks are not found, and neither are torch,
Triton and uvloop, which a plain installation there does not have. The few functions of system libraries that we call
via `ctypes` are implemented with this machine's. The standard library and other packages are unchanged. So a run shows
which names our code uses, not the results that they have on that system.
"""

from __future__ import annotations

import asyncio
import builtins
import ctypes
import os
import runpy
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

WHEEL = {"torch", "triton", "uvloop"}

# Names that Python 3.11 has on Linux and not there, of modules that we import. Source: the library's documentation,
# "Availability", and typeshed's `if sys.platform`.
LINUX_ALONE = {
    "os": (
        "sched_getaffinity sched_setaffinity sched_yield posix_fadvise posix_fallocate memfd_create eventfd pipe2 "
        "splice copy_file_range getrandom setresuid getresuid pidfd_open O_DIRECT O_PATH O_TMPFILE O_LARGEFILE"
    ),
    "signal": "SIGPOLL SIGPWR SIGSTKFLT SIGRTMIN SIGRTMAX sigtimedwait sigwaitinfo pidfd_send_signal",
    "socket": "SOCK_CLOEXEC SOCK_NONBLOCK AF_NETLINK AF_PACKET AF_VSOCK SO_PEERCRED SO_BINDTODEVICE",
    "time": "CLOCK_BOOTTIME CLOCK_TAI pthread_getcpuclockid",
    "mmap": "MAP_POPULATE MAP_DENYWRITE MAP_EXECUTABLE MAP_STACK MADV_HUGEPAGE MADV_DONTFORK MADV_REMOVE",
    "select": "epoll",
}
NOT_WINDOWS = {
    "os": (
        "sysconf confstr killpg fork forkpty register_at_fork getuid geteuid getgid getegid getgroups getpgid "
        "getpgrp getpriority setpriority PRIO_PROCESS setsid setpgid set_blocking get_blocking O_NONBLOCK "
        "O_CLOEXEC O_NOFOLLOW O_DIRECTORY O_SYNC O_NOCTTY tcgetpgrp tcsetpgrp ttyname ctermid openpty mkfifo "
        "mknod chown lchown fchown fchmod chroot fchdir statvfs fstatvfs uname getloadavg pread pwrite preadv "
        "pwritev readv writev sendfile nice wait wait3 wait4 waitid WNOHANG posix_spawn posix_spawnp lockf sync "
        "fdatasync environb getenvb fsencodeb EX_OK"
    ),
    "signal": (
        "SIGHUP SIGTSTP SIGCONT SIGKILL SIGQUIT SIGUSR1 SIGUSR2 SIGCHLD SIGPIPE SIGALRM SIGSTOP SIGWINCH SIGTTIN "
        "SIGTTOU alarm pause setitimer getitimer sigwait sigpending pthread_kill pthread_sigmask siginterrupt "
        "ITIMER_REAL"
    ),
    "socket": ("AF_UNIX MSG_DONTWAIT MSG_NOSIGNAL MSG_WAITALL SO_REUSEPORT SCM_RIGHTS CMSG_LEN send_fds recv_fds"),
    "time": (
        "clock_gettime clock_gettime_ns clock_settime CLOCK_MONOTONIC CLOCK_REALTIME CLOCK_PROCESS_CPUTIME_ID tzset"
    ),
    "mmap": (
        "MAP_PRIVATE MAP_SHARED MAP_ANON MAP_ANONYMOUS PROT_READ PROT_WRITE PROT_EXEC MADV_DONTNEED "
        "MADV_SEQUENTIAL MADV_WILLNEED MADV_NORMAL MADV_RANDOM MADV_FREE"
    ),
    "select": "poll epoll kqueue",
    "asyncio": "open_unix_connection start_unix_server",
}
_POSIX = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline", "posix", "curses"}
MISSING = {
    "darwin": WHEEL - {"uvloop"},
    "win32": WHEEL | _POSIX,
}
# Modules that detect this CPU's instructions, with Linux's interfaces here.
HERE = ("candle_vllm.core.kernels.cpu_runtime.level", "candle_vllm.core.kernels.cpu_runtime.machine_code")


class StandIn(ModuleType):
    """A module in which some names are missing and some are replaced."""

    def __init__(self, real: ModuleType, hidden: set[str], changed: Mapping[str, object]) -> None:
        super().__init__(real.__name__, real.__doc__)
        vars(self).update(changed, _real=real, _hidden=hidden)

    def __getattr__(self, name: str) -> object:
        if name in vars(self)["_hidden"]:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on {_system}")
        return getattr(vars(self)["_real"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(vars(self)["_real"], name, value)


_system = ""


def become(system: str) -> None:
    """Make our packages import that system's modules from now on."""
    global _system
    _system = system
    hidden = {name: set(names.split()) for name, names in LINUX_ALONE.items()}
    if system == "win32":
        for name, names in NOT_WINDOWS.items():
            hidden.setdefault(name, set()).update(names.split())
    changed = CHANGED[system]
    stand_ins = {
        name: StandIn(__import__(name), hidden.get(name, set()), changed.get(name, {})) for name in {*hidden, *changed}
    }
    real = builtins.__import__

    def found(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        spec = (globals or {}).get("__spec__")
        importer = spec.name if spec is not None else (globals or {}).get("__name__") or ""
        root = name.partition(".")[0]
        if level or not importer.startswith("candle_vllm") or importer in HERE:
            return real(name, globals, locals, fromlist, level)
        if root in MISSING[system]:
            raise ModuleNotFoundError(f"No module named {name!r} on {system}", name=root)
        module = real(name, globals, locals, fromlist, level)
        return stand_ins.get(name if fromlist else root, module)

    builtins.__import__ = found
    if system == "win32":
        sys.modules["uvloop"] = None  # uvicorn looks for it
        for method in ("add_reader", "add_writer", "remove_reader", "add_signal_handler"):
            setattr(asyncio.SelectorEventLoop, method, _not_implemented)
    sys.addaudithook(_no_files_of_linux)


def _not_implemented(*_: object) -> None:
    raise NotImplementedError


def _no_files_of_linux(event: str, arguments: tuple[Any, ...]) -> None:
    """Hide /proc and /sys from our packages."""
    if event == "open" and str(arguments[0]).startswith(("/proc", "/sys/")):
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") in ("pathlib", "pathlib._local", "io", "os"):
            frame = frame.f_back
        if frame is not None and frame.f_globals.get("__name__", "").startswith("candle_vllm"):
            raise FileNotFoundError(2, "No such file or directory", arguments[0])


# ---- what is otherwise there -----------------------------------------------------------------------------------------


def _is_socket(descriptor: int) -> bool:
    return stat.S_ISSOCK(os.fstat(descriptor).st_mode)


def _of_no_socket(call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(descriptor: int, *arguments: Any) -> Any:
        if _is_socket(descriptor):
            raise OSError(9, "Bad file descriptor: a socket is no file there")
        return call(descriptor, *arguments)

    return checked


def _select(*sets: Any) -> Any:
    if not all(_is_socket(each if isinstance(each, int) else each.fileno()) for some in sets[:3] for each in some):
        raise OSError(10038, "an operation was attempted on something that is not a socket")
    return select.select(*sets)


class _Popen(subprocess.Popen[Any]):
    """Popen whose children run as on the other system, too."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        if _system == "win32":
            assert not options.get("pass_fds"), "pass_fds not supported on Windows."
            assert not options.get("preexec_fn"), "preexec_fn is not supported on Windows platforms"
        python, *rest = command
        if python == sys.executable and rest[:2] == ["-P", "-m"]:
            command = [python, "-P", __file__, _system, *rest[2:]]
        super().__init__(command, **options)


class _Kernel32:
    """Functions of Windows, implemented with this machine's; semaphores are handles instead of addresses."""

    def __init__(self, name: str) -> None:
        assert name == "kernel32"
        libc = ctypes.CDLL(None)
        self.WaitForSingleObject, self.ReleaseSemaphore = libc.sem_wait, libc.sem_post
        libc.calloc.restype, libc.sem_init.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)

        def create(_attributes: None, count: int, _most: int, _name: None) -> int:
            handle = libc.calloc(1, 32)
            assert libc.sem_init(handle, 0, count) == 0
            return handle

        def close(handle: int) -> int:
            libc.free(ctypes.c_void_p(handle))
            return 1

        self.CreateSemaphoreW, self.CloseHandle = create, close

    def GlobalMemoryStatusEx(self, status: Any) -> int:
        assert status._obj.size == 64
        status._obj.total, status._obj.free = 16 << 30, 8 << 30
        return 1

    def GetLogicalProcessorInformation(self, records: Any, size: Any) -> int:
        core, cache = (bytes(8) + bytes([kind, 0, 0, 0]) + bytes(20) for kind in (0, 2))
        size._obj.value = 32 * 3
        if records is not None:
            records.raw = core + cache + core
        return int(records is not None)


class _Darwin:
    """Functions of macOS, whose C library has no POSIX semaphores in memory."""

    def __init__(self, name: str | None, **_: object) -> None:
        if name is not None:
            raise OSError(f"{name}: no such library")
        kernel = _Kernel32("kernel32")
        self.dispatch_semaphore_wait, self.dispatch_semaphore_signal = (
            kernel.WaitForSingleObject,
            kernel.ReleaseSemaphore,
        )

        def create(count: int) -> int:
            return kernel.CreateSemaphoreW(None, count, 0, None)

        def release(semaphore: int) -> None:
            kernel.CloseHandle(semaphore)

        def sysctlbyname(name: bytes, value: Any, _size: object, _new: None, _length: object) -> int:
            value._obj.value = 2
            return 0 if name == b"hw.physicalcpu" else -1  # a CPU with one kind of cores

        self.dispatch_semaphore_create, self.dispatch_release, self.sysctlbyname = create, release, sysctlbyname


CHANGED: dict[str, dict[str, dict[str, object]]] = {
    "win32": {
        "sys": {"platform": "win32"},
        "os": {"name": "nt", "read": _of_no_socket(os.read), "write": _of_no_socket(os.write)},
        "signal": {"SIGBREAK": signal.SIGUSR1},
        "socket": {"SO_EXCLUSIVEADDRUSE": socket.SO_KEEPALIVE},
        "select": {"select": _select},
        "subprocess": {"Popen": _Popen},
        "ctypes": {"WinDLL": _Kernel32},
    },
    "darwin": {
        "sys": {"platform": "darwin"},
        "subprocess": {"Popen": _Popen},
        "ctypes": {"CDLL": _Darwin},
    },
}


if __name__ == "__main__":
    system, module, *rest = sys.argv[1:]
    become(system)
    sys.argv = [module, *rest]
    if module == "-c":
        exec(rest[0], {"__name__": "__main__"})
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
