"""Commands without the seconds that each takes to import: forks of a process that has imported what they share.

    python -m tests.warm SOCKET                                serves until its stdin ends
    python -S tests/warm.py SOCKET train.py --workdir=...      what of it python does: a script, -m MODULE or -c CODE

Each command is a process of its own, in the client's folder and with its standard streams. Its environment is the
server's.
"""

import array
import importlib
import json
import os
import socket
import sys

# What no command's own module is among: each is to be imported as Python does it.
SHARED = ("cv2", "fastervit_jax.train.loop", "fastervit_jax.trained", "grain.python", "jax", "matplotlib.pyplot",
          "ml_collections.config_flags", "orbax.checkpoint", "sklearn.datasets")


def ask(path: str, arguments: list[str]) -> int:
    """The client: the command's exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        streams = array.array("i", [0, 1, 2])
        request = json.dumps([os.getcwd(), arguments]).encode()
        server.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        server.shutdown(socket.SHUT_WR)
        return int(server.recv(16))


def serve(path: str) -> list[str]:
    """Forks for one client after the other; it returns in the forks, with the command, and when stdin has ended."""
    import select
    for name in SHARED:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            client, _ = listener.accept()
            with client:
                request, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
                folder, arguments = json.loads(request)
                if (child := os.fork()) == 0:
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                    os.chdir(folder)
                    return arguments
                for stream in streams:
                    os.close(stream)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                client.sendall(str(code if code >= 0 else 128 - code).encode())
    return []


def become(arguments: list[str]) -> None:
    """Runs the command as `python ARGUMENTS` does."""
    import runpy
    kind, *rest = arguments
    sys.path[0] = ""
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.realpath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    if command := serve(sys.argv[1]):
        become(command)
