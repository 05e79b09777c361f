"""Tasks of lm-evaluation-harness, with whatever gives logits as the model.

The harness asks for the likelihood of continuations; all of them are gone through at once, so that
a model that is run layer by layer reads its weights once. Tasks that let the model write text would
need a pass for every token, and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mergekit_lite.errors import PackError, nearest
from mergekit_lite.evaluate.measure import Subject
from mergekit_lite.merge.run import Progress

__all__ = ["TaskScore", "require_harness", "run_tasks"]

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class TaskScore:
    """A number that the harness gives.

    Attributes:
        model: As the user named it.
        task: Name of the task.
        metric: Name of the metric, with its filter where that is not ``none``.
        value: What came out.
        error: Its standard error; None where the harness has none.
    """

    model: str
    task: str
    metric: str
    value: float
    error: float | None


def require_harness() -> None:
    """Refuse where the harness is not installed.

    Raises:
        PackError: It is missing.
    """
    if find_spec("lm_eval") is None:
        raise PackError(
            "--tasks runs lm-evaluation-harness, which is not installed",
            "pip install 'pack-models[tasks]'",
        )


def run_tasks(
    subjects: Sequence[Subject],
    tasks: Sequence[str],
    tokenizer: Any,
    longest: int,
    limit: int | None,
    shots: int | None,
    folder: Path | None,
    progress: Progress,
) -> list[TaskScore]:
    """Run tasks on models.

    Args:
        subjects: The models.
        tasks: Names as the harness has them.
        tokenizer: transformers' tokenizer of the models.
        longest: Most tokens that a model is given at once; the end of longer ones counts.
        limit: Examples of each task; None for all.
        shots: Examples before each question; None for what the task says.
        folder: Of further tasks; None for those of the harness.
        progress: Told how far it is.

    Raises:
        PackError: There is no such task, its data cannot be had, or it lets models write text.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise PackError(
            f"--tasks: the harness has no '{unknown[0]}'{nearest(unknown[0], manager.all_tasks)}",
            "List them: lm-eval ls tasks; your own: --task-path FOLDER",
        )
    scores = []
    for subject in subjects:
        model = _model_class()(subject, tokenizer, longest, progress)
        try:
            found = simple_evaluate(
                model=model, tasks=list(tasks), limit=limit, num_fewshot=shots,
                task_manager=manager, log_samples=False, bootstrap_iters=1000,
            )  # fmt: skip
        except PackError:
            raise
        except Exception as error:  # whatever the harness makes of it
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise PackError(
                f"--tasks: the harness fails: {said:.200}",
                "The data of a task comes from the Hub: is it there, or in the cache?",
            ) from None
        scores += list(_scores(subject.name, found))
    return scores


def _scores(model: str, found: Any) -> Iterator[TaskScore]:
    for task, values in sorted(found["results"].items()):
        for key, value in sorted(values.items()):
            name, comma, kind = key.partition(",")
            if not comma or "_stderr" in name or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{kind}")
            yield TaskScore(
                model, task, name if kind == "none" else f"{name} ({kind})", float(value),
                float(error) if isinstance(error, int | float) else None,
            )  # fmt: skip


def _model_class() -> Any:
    """The class that the harness talks to; made here, since its base is the harness's."""
    import torch
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class LogitsModel(TemplateLM):  # type: ignore[misc]
        """Whatever gives logits, as the harness wants a model."""

        def __init__(
            self, subject: Subject, tokenizer: Any, longest: int, progress: Progress
        ) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self._subject = subject
            self._longest = longest
            self._progress = progress

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            first = self.tokenizer.bos_token_id
            return self.eot_token_id if first is None else int(first)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_more: Any
        ) -> list[int]:
            keys = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            ids: list[int] = self.tokenizer(string, verbose=False, **keys)["input_ids"]
            return ids

        def _loglikelihood_tokens(self, requests: Any, **_more: Any) -> list[tuple[float, bool]]:
            rows = [
                ((context + continuation)[-self._longest :], len(continuation))
                for _, context, continuation in requests
            ]
            order = sorted(range(len(rows)), key=lambda at: (-len(rows[at][0]), at))
            groups: list[list[int]] = []
            for at in order:
                width = len(rows[groups[-1][0]][0]) if groups else 0
                if not groups or (len(groups[-1]) + 1) * width > max(_BATCH_TOKENS, width):
                    groups.append([])
                groups[-1].append(at)
            batches = [_padded([rows[at][0] for at in group]) for group in groups]
            found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
            self._subject.prepare(batches, self._progress)
            try:
                for group, logits in zip(groups, self._subject.logits(batches), strict=True):
                    for place, at in enumerate(group):
                        found[at] = _likelihood(logits[place], *rows[at])
            finally:
                self._subject.close()
            return found

        def loglikelihood_rolling(self, requests: Any, **_more: Any) -> list[float]:
            windows, owners = [], []
            for owner, request in enumerate(requests):
                pieces = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self._longest - 1,
                    context_len=1,
                )
                for piece in map(make_disjoint_window, pieces):
                    windows.append((None, *piece))
                    owners.append(owner)
            sums = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                sums[owner] += value
            return sums

        def generate_until(self, requests: Any, **_more: Any) -> list[str]:
            raise PackError(
                "--tasks: a task lets the model write text, which a model that is run layer by "
                "layer cannot do in sensible time",
                "Serve the model (pack deploy), and run the harness on that.",
            )

    def _padded(rows: list[list[int]]) -> Any:
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def _likelihood(logits: Any, ids: list[int], count: int) -> tuple[float, bool]:
        count = min(count, len(ids) - 1)
        wanted = torch.tensor(ids[len(ids) - count :])
        chosen = torch.log_softmax(logits[len(ids) - count - 1 : len(ids) - 1].double(), -1)
        greedy = bool((chosen.argmax(-1) == wanted).all())
        return float(chosen.gather(1, wanted[:, None]).sum()), greedy

    return LogitsModel
