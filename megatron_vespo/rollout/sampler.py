"""Draws completions from all engines; a draw survives lost engines, pauses and numbers of no use."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from megatron_vespo.rollout.buffer import PartialCompletions
from megatron_vespo.rollout.episode import Episodes
from megatron_vespo.rollout.generate_function import CustomGeneration
from megatron_vespo.rollout.generate_reply import RejectedDrawError
from megatron_vespo.rollout.router import CollectError, LostRequests, Router
from megatron_vespo.types import Completion, Prompt, SamplingParams

CHECK_INTERVAL_S = 1.0
# A rare overflow costs one draw. If it were frequent, the policy would train on a biased selection.
MAX_REJECTED_SHARE = 0.03
Check = Callable[[], None]
Maker = Episodes | CustomGeneration


class TooManyRejectedError(CollectError):
    """Too many completions cannot be trained on: the engine or the weights must be broken."""


class RejectedDraws:
    """Counts the completions that are sampled again among `total`; too many are an error."""

    def __init__(self, total: int):
        self.total, self._num = total, 0

    def add(self, error: RejectedDrawError) -> None:
        self._num += 1
        if self._num > max(1, MAX_REJECTED_SHARE * self.total):
            raise TooManyRejectedError(
                f"{self._num} of {self.total} completions had {error.what}, more than "
                f"{MAX_REJECTED_SHARE:.0%}; the last one: {error}"
            ) from error


class Seeds(NamedTuple):
    """Seeds of one completion's draws."""

    seed: int  # of the group
    index: int  # of the completion in the group
    num_completions: int  # of the group

    def of(self, prompt_id: int, num_rejections: int) -> int:
        """Return the sampling seed after `num_rejections` draws that could not be trained on."""
        return completion_seed(self.seed, prompt_id, self.index + self.num_completions * num_rejections)


class Sampler:
    """Draws from all engines by `router`; usable only inside one event loop.

    `maker` makes a completion of several draws. Without it, each draw is a completion.
    """

    def __init__(
        self,
        router: Router,
        lost: LostRequests,
        check: Check | None,
        maker: Maker | None = None,
        is_evaluation: bool = False,
    ):
        self._router, self._lost, self._check = router, lost, check
        self._maker, self._is_evaluation = maker, is_evaluation

    async def draw(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        seed: int,
        index: int,
        num_completions: int,
        rejected: RejectedDraws,
        partials: PartialCompletions | None = None,
    ) -> Completion:
        """Completion `index` of a group; one that cannot be trained on is sampled again.

        It continues from `partials[index]`, which always has the tokens generated so far. A completion that
        an engine returns unfinished continues after `release`.
        """
        known: PartialCompletions = [None] * num_completions if partials is None else partials
        begun = known[index]
        if begun is not None and begun.finish_reason != "abort":
            return begun
        if begun is not None and _is_of_other_sampling(begun, sampling):
            begun = None  # the run was resumed with another kind of sampling

        def keep(partial: Completion | None) -> None:
            known[index] = partial

        def unfinished(partial: Completion | None) -> None:  # a turn that ends does not end the episode
            known[index] = None if partial is None else replace(partial, finish_reason="abort")

        async def turn(sampling: SamplingParams, begun: Completion | None) -> Completion:
            unfinished(begun)
            seeds = Seeds(seed, index, num_completions)
            return await self._complete(prompt, sampling, seeds, rejected, begun, unfinished)

        async def ask(
            prompt: Prompt, sampling: SamplingParams, seed: int, begun: Completion | None = None
        ) -> Completion:
            return await self._complete(prompt, sampling, Seeds(seed, 0, 1), rejected, begun, lambda _: None)

        if self._maker is None:
            seeds = Seeds(seed, index, num_completions)
            return await self._complete(prompt, sampling, seeds, rejected, begun, keep)
        if isinstance(self._maker, Episodes):
            completion = await self._maker.play(prompt, sampling, turn, begun)
        else:
            own_seed = completion_seed(seed, prompt.prompt_id, index)
            completion = await self._maker.run(ask, prompt, sampling, own_seed, self._is_evaluation)
        keep(completion)
        return completion

    async def hold(self, timeout_s: float) -> None:
        """Makes engines return unfinished responses, and sends no request until `release`."""
        await self._router.hold(timeout_s)

    def release(self) -> None:
        self._router.release()

    async def watch(self, on_wait: Callable[[], None] | None = None) -> None:
        """Calls `check` and `on_wait` every second and raises what they raise; `on_wait` may block."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._run_check()
            if on_wait is not None:
                on_wait()
            self._router.refresh()
            self._lost.report()

    async def _complete(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        seeds: Seeds,
        rejected: RejectedDraws,
        partial: Completion | None,
        keep: Callable[[Completion | None], None],
    ) -> Completion:
        """Draws until the engine has ended the completion; `keep` always has the tokens generated so far."""
        rejections: tuple[str, ...] = ()
        while partial is None or partial.finish_reason == "abort":
            seed = seeds.of(prompt.prompt_id, len(rejections))
            try:
                partial = await self._draw_once(prompt, sampling, seed, partial)
                keep(partial)
            except RejectedDrawError as error:
                rejected.add(error)
                rejections += (str(error),)
        partial.rejections += rejections
        return partial

    async def _draw_once(
        self, prompt: Prompt, sampling: SamplingParams, seed: int, partial: Completion | None
    ) -> Completion | None:
        try:
            return await self._router.send(
                lambda client: client.generate(prompt, sampling, seed, partial), f"prompt {prompt.prompt_id}"
            )
        except CollectError:
            # The connection breaks a moment before the process is known to be dead.
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._run_check()
            raise

    async def _run_check(self) -> None:
        if self._check is not None:
            await asyncio.to_thread(self._check)


def _is_of_other_sampling(begun: Completion, sampling: SamplingParams) -> bool:
    """Whether `begun` and its continuation could not be one completion, of one temperature."""
    has_supports = begun.supports is not None
    return has_supports != sampling.with_supports or begun.temperature != sampling.temperature


def completion_seed(seed: int, prompt_id: int, index: int) -> int:
    """31-bit sampling seed of completion `index` of a prompt; it does not depend on engine or time."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
