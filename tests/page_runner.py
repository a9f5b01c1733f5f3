"""Runs the pages' code in forks of one process that has imported everything: a page costs its own work alone.

    with PageRunner(folder, environment) as runner:
        output = runner.run(folder, [("python", "print(1)"), ("command", "python examples/train.py --max_steps 2")])

Each run is a fresh interpreter to the code: its own `__main__`, its own folder, nothing left of the runs before it.
"""

import argparse
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900  # for one run; what takes longer hangs


class PageRunner:
    """The process from which runs are forked, with an environment of its own (`HF_ENDPOINT` is read at import)."""

    def __init__(self, environment):
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**kept, "PYTHONPATH": path, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder, steps):
        """Runs steps in one fresh process in `folder`, and returns what they print; a failure says which step."""
        self.process.stdin.write(json.dumps({"folder": str(folder), "steps": steps}) + "\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        output, errors = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout.txt", "stderr.txt"))
        assert code == "0", f"ended with {code}\n{output[-1000:]}\n{errors[-5000:]}"
        return output

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def run_command(command, parse_only):
    """What a shell does with `python FILE ...` and `coop-hf ...`, in this process.

    With `parse_only` it ends where the arguments have been read and found good.
    """
    words = shlex.split(command)
    if words[:1] == ["coop-hf"]:
        words = ["python", "-m", "coop_hf", *words[1:]]
    assert words[0] == "python", command
    is_module = words[1] == "-m"
    sys.argv = words[2:] if is_module else words[1:]
    if parse_only:
        stop_after_parsing()
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            script = ROOT / sys.argv[0]
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
        assert not parse_only, f"{command}: it reads no arguments"
    except Parsed:
        pass
    except ModuleNotFoundError as error:  # of a script that needs more than the tests have
        assert parse_only and not error.name.startswith("coop_hf"), f"{command}: {error}"
    except SystemExit as end:
        assert not end.code, f"{command}: ended with {end.code!r}"


class Parsed(BaseException):
    """The arguments of a command are good."""


def stop_after_parsing():
    from transformers import HfArgumentParser

    def stopping(parse):
        def parse_and_stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    argparse.ArgumentParser.parse_args = stopping(argparse.ArgumentParser.parse_args)
    argparse.ArgumentParser.parse_intermixed_args = stopping(argparse.ArgumentParser.parse_intermixed_args)
    HfArgumentParser.parse_args_into_dataclasses = stopping(HfArgumentParser.parse_args_into_dataclasses)


def run_steps(steps):
    main = types.ModuleType("__main__")  # a real one: what is pickled by name is looked for in it
    sys.modules["__main__"] = main
    for kind, text in steps:
        if kind == "python":
            exec(compile(text, "<page>", "exec"), main.__dict__)
        else:
            run_command(text, parse_only=kind == "parse")


def serve():
    """Reads runs, a line each, and answers with the exit code of each."""
    import coop_hf
    import coop_hf.baselines
    import coop_hf.experiments.commands  # noqa: F401

    for name in coop_hf.__all__:  # they are loaded when they are first asked for
        getattr(coop_hf, name)
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.chdir(request["folder"])
            for stream, name in ((0, os.devnull), (1, "stdout.txt"), (2, "stderr.txt")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), stream)
            signal.alarm(SECONDS)
            code = 1
            try:
                run_steps(request["steps"])
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
