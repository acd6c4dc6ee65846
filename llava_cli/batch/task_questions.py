"""Which questions of a batch are templates, and their fields: filled in when a row's picture is at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from llava_cli import limits
from llava_cli.batch.sources.questions import Check
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Picture
from llava_cli.errors import UsageError
from llava_cli.prompts.question_fields import QuestionFields, columns_hint
from llava_cli.untrusted_text import one_line

_MOST_COLUMNS = 20
"""That a message lists."""


class TaskQuestions:
    """Fills in the fields of tasks' questions: of all, or only of `questions`, which are those of the command line.

    `is_saved` says that the latter are a saved prompt.
    """

    def __init__(self, fields: QuestionFields, questions: Sequence[str], every: bool, is_saved: bool) -> None:
        self._fields, self._questions, self._every, self._is_saved = fields, questions, every, is_saved
        self.columns: dict[str, None] = {}
        """Columns of which questions have fields."""
        self._found: dict[str, None] = {}
        """Columns that rows have."""

    def check_command_line(self) -> None:
        """Raises `UsageError` for a question of the command line that cannot be filled in."""
        for question in self._questions:
            self._note_columns(question)
        self._fields.check_parameters(self._questions)

    def checking(self, check: Check) -> Check:
        """A check of tasks that raises `UsageError` as `check` does, and for a question that cannot be filled in."""

        def check_both(task: Task) -> None:
            check(task)
            if self._is_template(task):
                self._note_columns(task.question)

        return check_both

    def checked(self, tasks: Iterator[Task]) -> Iterator[Task]:
        """The tasks. Raises `UsageError` at their end for a column that a question uses and no row has."""
        for task in tasks:
            if task.row and len(self._found) < limits.COUNTED_NAMES:
                self._found |= dict.fromkeys(task.row)
            yield task
        if len(self._found) < limits.COUNTED_NAMES:
            self._refuse_unknown_columns()

    def fill(self, task: Task, picture: Picture, folder: str) -> Task:
        """A task with its question filled in; its path begins at `folder`. Raises as `QuestionFields.fill`."""
        if not self._is_template(task):
            return task
        return replace(task, asked=self._fields.fill(task.question, picture, task.image, folder, task.row))

    def said(self) -> dict[str, Any]:
        """What all rows of a run have in common of this."""
        return {"template_question": "all" if self._every else "prompt", "parameters": self._fields.parameters}

    def close(self) -> None:
        """Ends its processes."""
        self._fields.close()

    def _is_template(self, task: Task) -> bool:
        return self._every or task.question in self._questions

    def _note_columns(self, question: str) -> None:
        is_saved = self._is_saved and question in self._questions
        columns = self._fields.check(question, is_saved).members.get("row", frozenset())
        if len(self.columns) < limits.COUNTED_NAMES:
            self.columns |= dict.fromkeys(sorted(columns))

    def _refuse_unknown_columns(self) -> None:
        reason, hint = "nothing of SOURCE has columns", "tables, archives and questions files may have some"
        for column in self.columns.keys() - self._found.keys():
            if self._found:
                reason, hint = "no row has such a column", columns_hint(column, list(self._found)[:_MOST_COLUMNS])
            raise UsageError(f"{{row.{one_line(column, 40)}}}", reason, hint)
