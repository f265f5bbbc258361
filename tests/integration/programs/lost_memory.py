"""A plugin of SGLang: memory that an engine gives back is lost, as on a GPU; a CPU keeps it."""

from __future__ import annotations

import torch


def activate() -> None:
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    release = SchedulerWeightUpdaterManager.release_memory_occupation

    def release_and_lose(self, request):
        answer = release(self, request)
        runner = self.tp_worker.model_runner
        if "weights" in request.tags:
            _lose([*runner.model.parameters(), *runner.model.buffers()])
        if "kv_cache" in request.tags:
            pool = runner.token_to_kv_pool
            _lose([*pool.k_buffer, *pool.v_buffer])
        print(f"lost: {' '.join(request.tags)}", flush=True)
        return answer

    SchedulerWeightUpdaterManager.release_memory_occupation = release_and_lose


@torch.inference_mode()
def _lose(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
