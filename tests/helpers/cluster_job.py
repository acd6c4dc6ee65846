"""A job of a cluster's tests, as a process that they can kill: `python -m helpers.cluster_job SOURCE OUTPUT`.

Its model answers at once, unless LLAVA_TEST_MODEL is `builtin`. With an ADDRESS as third word it runs on that cluster,
otherwise it is the single run that the rows are held against. Workers import this module, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers.faults import Told

from llava_cli.batch import run as module
from llava_cli.batch.cluster.driver import run_on_cluster
from llava_cli.batch.cluster.worker import open_model
from llava_cli.batch.run import Job, run
from llava_cli.batch.sources.source import Source
from llava_cli.conversation import Conversation
from llava_cli.engine import Chunk
from llava_cli.settings import Sampling, Settings

DEADLY = "deadly"
"""In the name of a picture that ends its worker."""


class Deadly(Told):
    """Ends its process at some pictures."""

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Chunk]:
        if DEADLY in conversation.turns[-1].pictures[0].name:
            os._exit(9)
        return super().stream(conversation, sampling)


def open_deadly(job: Job) -> Deadly:
    return Deadly()


def main(source: str, output: str, address: str | None = None) -> int:
    is_builtin = os.environ.get("LLAVA_TEST_MODEL") == "builtin"
    job = Job(Source([source], ("what color?",)), Settings(), "llava batch …", Path(output), json_progress=True)
    if address is not None:
        return run_on_cluster(job, address, None, open_model if is_builtin else open_deadly)
    if not is_builtin:
        module.open_engine = lambda *_: Told()
    return run(job)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
