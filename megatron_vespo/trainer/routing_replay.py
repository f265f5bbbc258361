"""Imposes recorded expert choices on a forward pass: those of pi_old (R2) or of the engine (R3).

Shape suffixes: T tokens of the pack that this context-parallel rank holds, R the slice of them that the
routers of this rank see under sequence parallelism, L layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_vespo.data.host_memory import to_device, to_host
from megatron_vespo.data.micro_batch import MicroBatch

FREE = -1  # instead of an expert: the router chooses for this token
# model chunk, micro-batch -> the context that the chunk's forward pass runs in
Routing = Callable[[int, MicroBatch], AbstractContextManager]


def free_routing(chunk: int, micro_batch: MicroBatch) -> AbstractContextManager:
    """The routers choose for themselves."""
    return nullcontext()


class PartialReplay(RouterReplay):
    """Megatron's slot of one router. If `leaves_free`, its target may hold FREE for some tokens."""

    leaves_free = False
    differences: Tensor | None = None  # int32 [R], see `RoutingReplay.comparing`; counted if not None

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        """Megatron's arguments: scores [R, experts]. Returns the chosen scores [R, K] and their experts."""
        if self.leaves_free and self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            target = self.target_topk_idx
            _, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)  # pyright: ignore[reportCallIssue]
            # the pass that recomputes this one makes the same choice, whatever its rounding
            self.target_topk_idx = self.replay_backward_list[-1] = torch.where(target == FREE, own, target)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if self.differences is not None and self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            _, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)  # pyright: ignore[reportCallIssue]
            shared = (self.target_topk_idx[:, :, None] == own[:, None, :]).any(2)  # pyright: ignore[reportOptionalSubscript]
            self.differences = (~shared).sum(1, dtype=torch.int32)
        return super().get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)


class RoutingReplay:
    """The routers of this rank. Needs --moe-enable-routing-replay, which gives each router a slot."""

    def __init__(self, model: list, groups: ProcessGroupCollection, sequence_parallel: bool):
        self._routers = [
            [module for module in unwrap_model(chunk).modules() if isinstance(module, TopKRouter)]  # pyright: ignore[reportAttributeAccessIssue]
            for chunk in model
        ]
        for router in (router for chunk in self._routers for router in chunk):
            if router.router_replay is not None:
                router.router_replay.__class__ = PartialReplay
        self._slices = (groups.tp.rank(), groups.tp.size()) if sequence_parallel else (0, 1)
        self._compares = False

    @contextmanager
    def record(self, chunk: int, micro_batch: MicroBatch) -> Iterator[None]:
        """Store the routers' choices as the micro-batch's `old_routes`."""
        self._set_action(chunk, RouterReplayAction.RECORD)
        yield
        slots: list[Any] = [router.router_replay for router in self._routers[chunk]]
        routes = [slot.get_recorded_indices().to(torch.uint8) for slot in slots]
        if routes:
            micro_batch.old_routes[chunk] = to_host(torch.stack(routes))
        self._set_action(chunk, None)

    @contextmanager
    def replay(self, chunk: int, micro_batch: MicroBatch) -> Iterator[None]:
        """Impose the recorded routes, or else the engine's, where they exist. Afterwards call `finish`.

        The slot keeps the routes of every micro-batch in flight. Backward passes, which recompute forward
        passes, run in the order of the forward passes and take the first routes waiting.
        """
        for router, routes in zip(self._routers[chunk], self._routes(chunk, micro_batch), strict=True):
            router.router_replay.set_target_indices(routes)  # pyright: ignore[reportOptionalMemberAccess]
            router.router_replay.leaves_free = micro_batch.replays_S is not None  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        self._set_action(chunk, RouterReplayAction.REPLAY_FORWARD)
        yield
        if self._compares:
            micro_batch.expert_differences[chunk] = self._take_differences(chunk, micro_batch)
        # from here to the next forward pass, routers compute only for backward passes
        self._set_action(chunk, RouterReplayAction.REPLAY_BACKWARD)

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Inside, passes that replay also count the imposed experts that the routers would not have chosen.

        The counts become the micro-batches' `expert_differences`.
        """
        slots: list[Any] = [router.router_replay for chunk in self._routers for router in chunk]
        slots = [slot for slot in slots if slot is not None]
        self._compares = True
        for slot in slots:
            slot.differences = torch.zeros(0)
        try:
            yield
        finally:
            self._compares = False
            for slot in slots:
                slot.differences = None

    def _take_differences(self, chunk: int, micro_batch: MicroBatch) -> Tensor:
        """The sum over the chunk's layers, int32 [R]."""
        slots: list[Any] = [router.router_replay for router in self._routers[chunk]]
        tokens_R = self.seen(micro_batch.tokens_T)
        none_R = torch.zeros(len(tokens_R), dtype=torch.int32, device=tokens_R.device)
        return sum((slot.differences for slot in slots), none_R)

    def finish(self) -> None:
        """Let the routers choose for themselves again, and drop the routes of the last schedule."""
        for chunk, routers in enumerate(self._routers):
            self._set_action(chunk, None)
            for router in routers:
                if router.router_replay is not None:
                    router.router_replay.clear_indices()

    @contextmanager
    def observe(self, chunk: int) -> Iterator[dict[int, Tensor]]:
        """Layer number -> int64 [R, K], every token's experts, ascending. The forward pass fills it."""
        chosen: dict[int, Tensor] = {}

        def keep(router: TopKRouter, inputs, output: tuple[Tensor, Tensor]) -> None:
            routing_map = output[1]  # bool [R, experts]
            chosen[router.layer_number - 1] = routing_map.nonzero()[:, 1].view(len(routing_map), router.topk)  # pyright: ignore[reportOptionalOperand]

        handles = [router.register_forward_hook(keep) for router in self._routers[chunk]]
        yield chosen
        for handle in handles:
            handle.remove()

    def local_layers(self, chunk: int) -> list[int]:
        """Global numbers, from 0, of the layers whose routers are in the chunk."""
        return [router.layer_number - 1 for router in self._routers[chunk]]  # pyright: ignore[reportOptionalOperand]

    @property
    def sees_a_slice(self) -> bool:
        """Whether the routers of other tensor-parallel ranks see other tokens."""
        return self._slices[1] > 1

    def seen(self, values_T: Tensor) -> Tensor:
        """The slice of a per-token field that this rank's routers see."""
        index, size = self._slices
        return values_T.chunk(size)[index]

    def _routes(self, chunk: int, micro_batch: MicroBatch) -> list[Tensor]:
        if not self._routers[chunk]:
            return []
        if micro_batch.old_routes:
            routes_LRK = to_device(micro_batch.old_routes[chunk], micro_batch.tokens_T.device)
            return list(routes_LRK.long())
        if micro_batch.routed_experts_T is None:
            assert micro_batch.replays_S is not None, "the micro-batch has no routes to replay"
            tokens_R = self.seen(micro_batch.tokens_T)
            return [tokens_R.new_full((len(tokens_R), r.topk), FREE) for r in self._routers[chunk]]
        routes_R = self.seen(micro_batch.routed_experts_T).long()
        if micro_batch.replays_S is not None:
            free_R = self.seen(~micro_batch.replays_S[micro_batch.sequence_ids_T])
            routes_R = routes_R.masked_fill(free_R[:, None, None], FREE)
        return [routes_R[:, layer] for layer in self.local_layers(chunk)]

    def _set_action(self, chunk: int, action: RouterReplayAction | None) -> None:
        for router in self._routers[chunk]:
            if router.router_replay is not None:
                router.router_replay.set_router_replay_action(action)  # pyright: ignore[reportArgumentType]
