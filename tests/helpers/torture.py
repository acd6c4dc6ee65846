"""What kills the workers, nodes and drivers of a run on a cluster; and an engine that costs them nothing."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from helpers.clusters import Driver, TestCluster

INSTANT = '''
import os

from llava_cli.batch import run
from llava_cli.batch.cluster import driver
from llava_cli.engine import Answer, Chunk, Engine
from llava_cli.start import main


class Instant(Engine):
    """Answers at once, with the picture's name, but ends its process at those that are deadly."""

    model, precision, device = "instant", "fp32", "cpu"

    def stream(self, conversation, sampling):
        text = conversation.turns[-1].pictures[0].name
        if "deadly" in text:
            os._exit(9)
        yield Chunk(text, Answer(text, "stop", 5, 0, 1, 0.0, 0.0))

    def prompt(self, conversation):
        return conversation.turns[-1].question

    def count(self, conversation):
        return 5

    def peak_memory(self):
        return 0


run_on_cluster = driver.run_on_cluster
driver.run_on_cluster = lambda job, address, workers: run_on_cluster(job, address, workers, lambda job: Instant())
run.open_engine = lambda *options: Instant()
main()
'''
"""A script for `Driver`, also of a single run."""


class Torture:
    """The drivers of a run, one after the other, and their cluster."""

    def __init__(self, cluster: TestCluster, random: Random, start: Callable[[], Driver]) -> None:
        self._cluster, self._random, self._start = cluster, random, start
        self.driver = start()

    def kill_driver(self) -> None:
        self.driver.kill()
        self.driver = self._start()

    def kill_worker(self) -> None:
        """Waits for one, where a driver has just begun."""
        self.driver.until(lambda: bool(self._cluster.workers()))
        self._random.choice(self._cluster.workers()).kill()

    def kill_node(self) -> None:
        self._cluster.kill_node(self._random.choice(sorted(self._cluster.nodes, key=lambda node: node.unique_id)))

    def add_node(self) -> None:
        self._cluster.add_node()
