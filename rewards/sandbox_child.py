"""The inside of rlflow.rewards.sandbox: run as a script, by the interpreter alone, without site-packages.

    this process   namespaces of its own: mounts, processes, network, IPC, host name (and users, without root)
      its child    process 1 there: a root of read-only system directories and a small /tmp, no privilege, limits;
                   it becomes the interpreter that runs the program

What process 1 leaves behind the kernel kills with it. Exit code 77 says that this machine does not let it be set up.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

NOT_ISOLATED = 77
NOBODY = 65534
_CLONE = {
    "user": 0x10000000,
    "mount": 0x20000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x8000000,
    "uts": 0x4000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_NOATIME, _MS_NODIRATIME, _MS_BIND, _MS_REC, _MS_PRIVATE, _MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_KEPT_FLAGS = {
    os.ST_NOSUID: _MS_NOSUID,
    os.ST_NODEV: _MS_NODEV,
    os.ST_NOEXEC: _MS_NOEXEC,
    os.ST_NOATIME: _MS_NOATIME,
    os.ST_NODIRATIME: _MS_NODIRATIME,
    os.ST_RELATIME: _MS_RELATIME,
}
"""Of a mount, what a user's namespace may not take off."""
_libc = ctypes.CDLL(None, use_errno=True)


def main(settings: dict) -> int:
    uid, gid = os.geteuid(), os.getegid()
    kinds = set(_CLONE) - ({"user"} if uid == 0 else set())
    _call("unshare", sum(_CLONE[kind] for kind in kinds))
    if uid != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                file.write(text)
    _enter_root(settings)
    child = os.fork()
    if child == 0:
        _become_program(settings)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF


def _enter_root(settings: dict) -> None:
    """Makes the program's root, and goes there."""
    root = settings["root"]
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={settings['disk_bytes']},nr_inodes=4096,mode=755")
    for path in settings["readable"]:
        target = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            _mount(path, target, None, _MS_BIND)
            found = os.statvfs(target).f_flag
            kept = sum(flag for bit, flag in _KEPT_FLAGS.items() if found & bit)
            _mount("none", target, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | kept)
    os.makedirs(root + "/dev")
    for device in ("null", "urandom"):
        open(f"{root}/dev/{device}", "w", encoding="utf-8").close()
        _mount(f"/dev/{device}", f"{root}/dev/{device}", None, _MS_BIND)
    os.makedirs(root + "/old")
    os.makedirs(root + "/tmp")
    os.chmod(root + "/tmp", 0o777)
    _call("syscall", _PIVOT_ROOT[os.uname().machine], root.encode(), f"{root}/old".encode())
    os.chdir("/")
    _call("umount2", b"/old", _MNT_DETACH)
    os.rmdir("/old")
    os.chdir("/tmp")


def _become_program(settings: dict) -> None:
    """Gives up every privilege and becomes the interpreter. Never returns."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # The kernel forgets the wish when the user changes.
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if _drop_capabilities() != 0:
        os._exit(NOT_ISOLATED)
    limits = {
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_CPU: settings["cpu_s"],
        resource.RLIMIT_FSIZE: settings["disk_bytes"],
        resource.RLIMIT_NPROC: settings["processes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    os.execve(settings["python"], [settings["python"], "-I", "-S", "-B", "-c", settings["runner"]], environment)


def _drop_capabilities() -> int:
    """All of them, of this process and what it starts."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    return _libc.capset(header, data)


_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    try:
        code = main(json.loads(sys.argv[1]))
    except (OSError, KeyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = NOT_ISOLATED
    os._exit(code)
