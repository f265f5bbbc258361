"""Teachers score responses: the log-probs that they give to the tokens that the policy sampled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from megatron_vespo.rollout.engine_client import HttpEngineClient, engine_session
from megatron_vespo.rollout.router import CollectError, LostRequests, Router
from megatron_vespo.types import Completion, Prompt

CHECK_INTERVAL_S = 1.0
MAX_REQUESTS_PER_ENGINE = 512
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TeacherEngines:
    """The engines of one teacher, which scores the prompts of `source`; None: all prompts.

    `urls[number]` may change; None: out of service. `check` raises if they will never serve again.
    """

    name: str  # in messages
    source: str | None
    urls: Sequence[str | None]
    lost: LostRequests
    check: Callable[[], None] = lambda: None
    api_key: str | None = None


class Teachers:
    """All teachers of a run. `key` is the metadata of a prompt that names its source.

    `timeout_s` is the deadline of one request. If an engine is lost, another one gets the request, or the
    same one after its restart; in all, a request is sent at most `max_attempts` times.
    """

    def __init__(self, teachers: Sequence[TeacherEngines], key: str, *, timeout_s: float, max_attempts: int):
        self._teachers, self._key = teachers, key
        self._timeout_s, self._max_attempts = timeout_s, max_attempts

    def score(self, completions: Sequence[Completion], on_progress: Progress | None = None) -> None:
        """Fill in `teacher_log_probs`; blocks the calling thread. Raises the first failure, as `Router.send`.

        A completion that has them already, from a checkpoint, is not sent again.
        """
        asyncio.run(self._score(completions, on_progress))

    async def _score(self, completions: Sequence[Completion], on_progress: Progress | None) -> None:
        async with self.connect() as scoring:
            watch = asyncio.create_task(scoring.watch())
            scores = asyncio.create_task(scoring.score(completions, on_progress))
            try:
                await asyncio.wait((watch, scores), return_when=asyncio.FIRST_COMPLETED)
                await (watch if watch.done() else scores)  # raises what has failed
            finally:
                for task in (watch, scores):
                    task.cancel()
                await asyncio.gather(watch, scores, return_exceptions=True)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[TeacherScoring]:
        """Connections for one event loop."""
        async with engine_session(self._timeout_s) as session:

            def router(teacher: TeacherEngines) -> Router[HttpEngineClient]:
                return Router(
                    teacher.urls,
                    lambda _, url: HttpEngineClient(url, session, None, teacher.api_key),
                    max_requests=MAX_REQUESTS_PER_ENGINE * len(teacher.urls),
                    max_attempts=self._max_attempts,
                    timeout_s=self._timeout_s,
                    on_requests=None,
                    lost=teacher.lost,
                )

            try:
                yield TeacherScoring([(teacher, router(teacher)) for teacher in self._teachers], self._key)
            finally:
                for teacher in self._teachers:
                    teacher.lost.report()


class TeacherScoring:
    """Scores inside one event loop; `teachers` have a router each."""

    def __init__(self, teachers: Sequence[tuple[TeacherEngines, Router[HttpEngineClient]]], key: str):
        self._teachers, self._key = teachers, key

    async def score(self, completions: Sequence[Completion], on_progress: Progress | None = None) -> None:
        """Fill in `teacher_log_probs` of all completions at once."""
        done = 0

        async def score_one(completion: Completion) -> None:
            nonlocal done
            if completion.teacher_log_probs is None:
                completion.teacher_log_probs = await self._log_probs(completion)
            done += 1
            if on_progress is not None:
                on_progress(done, len(completions))

        try:
            async with asyncio.TaskGroup() as tasks:
                for completion in completions:
                    tasks.create_task(score_one(completion))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def watch(self) -> None:
        """Every second: raises if a teacher is lost for good, and notices engines that serve again."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            for teacher, router in self._teachers:
                await asyncio.to_thread(teacher.check)
                router.refresh()
                teacher.lost.report()

    async def _log_probs(self, completion: Completion) -> np.ndarray:
        prompt = completion.prompt
        source = source_of(prompt, self._key)
        found = [pair for pair in self._teachers if pair[0].source in (None, source)]
        if not found:  # the run's prompts were checked; a generate function may return another one
            raise CollectError(f"prompt {prompt.prompt_id} has no teacher: its {self._key!r} is {source!r}")
        teacher, router = found[0]
        end = len(completion.token_ids) - completion.num_given_at_end
        tokens = np.concatenate([prompt.token_ids, completion.token_ids[:end]])
        what = f"scoring of prompt {prompt.prompt_id} by {teacher.name}"
        scores = await router.send(lambda client: client.score(tokens, len(prompt.token_ids), what), what)
        return scores if completion.segments is None else scores[completion.segments.mask()[:end]]


def source_of(prompt: Prompt, key: str) -> str | None:
    """The prompt's source, None if it names none."""
    source = prompt.metadata.get(key)
    return None if source is None else str(source)


def prompt_without_teacher(
    prompts: Iterable[Prompt], sources: Sequence[str | None], key: str
) -> Prompt | None:
    """The first prompt that none of the teachers, known by their sources, scores."""
    if None in sources:
        return None
    return next((prompt for prompt in prompts if source_of(prompt, key) not in sources), None)
