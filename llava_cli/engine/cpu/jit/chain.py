"""One call for kernels that follow each other."""

from __future__ import annotations

from llvmlite import ir

from llava_cli.engine.cpu.jit.builder import I8, I64, NONE, Kind, Writer, task

Task = task(("runs", "tasks"), ("kernels",))
"""Where the code of each is, and where what it is given."""


def write(kind: Kind, bf16: bool) -> str:
    return str(_Chain(kind, bf16).module)


class _Chain(Writer):
    def __init__(self, kind: Kind, bf16: bool) -> None:
        super().__init__(Task, kind, bf16)
        pointer = I8.as_pointer()
        with self.function("run"):
            b, runs, tasks = self.b, self.array("runs", pointer), self.array("tasks", pointer)
            with self.loop(I64(0), self.count("kernels")) as number:
                run = b.bitcast(b.load(self.at(runs, number)), ir.FunctionType(NONE, [pointer]).as_pointer())
                b.call(run, [b.load(self.at(tasks, number))])
