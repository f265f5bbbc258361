"""A plugin of SGLang: of the weights that an engine is sent, one tensor arrives with one wrong element.

From the second update on, so that what an engine compares at its start is right.
"""

from __future__ import annotations

import torch


def activate() -> None:
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    end = SchedulerWeightUpdaterManager.end_weight_update
    updates = [0]

    def end_and_corrupt(self, request):
        answer = end(self, request)
        updates[0] += answer.success  # an end without a begin is refused
        if updates[0] > 1:
            with torch.inference_mode():
                self.tp_worker.model_runner.model.model.norm.weight[0] += 1
            print("corrupted", flush=True)
        return answer

    SchedulerWeightUpdaterManager.end_weight_update = end_and_corrupt
