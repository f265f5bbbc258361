"""Parses parallel layouts such as "tp2,pp2,ep2" into the Megatron flags that they stand for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

WORDS = "tpN ppN vppN cpN epN etpN dpN"
# every flag that a layout sets
FLAGS = (
    "--trainer-ranks",
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--num-virtual-stages-per-pipeline-rank",
    "--context-parallel-size",
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
    "--sequence-parallel",
)


@dataclass(frozen=True)
class Layout:
    """The sizes of a parallel layout.

    Example:
        Layout.parse("tp2,pp2,ep2") == Layout("tp2,pp2,ep2", tp=2, pp=2, vpp=1, cp=1, ep=2, etp=1, dp=1)
    """

    name: str  # the words it was made from
    tp: int  # tensor parallel size
    pp: int  # pipeline stages
    vpp: int  # virtual pipeline stages per rank
    cp: int  # context parallel size
    ep: int  # expert parallel size
    etp: int  # tensor parallel size inside an expert
    dp: int  # data parallel size

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads comma-separated words, see `WORDS`; a size that is not named is 1.

        Without dpN the data-parallel size is the smallest one that fits the experts' layout: Megatron
        arranges the same ranks as pp x dp x cp x tp for attention and as pp x (expert dp) x ep x etp for
        experts. ValueError for an unknown or repeated word and for sizes that do not fit each other.
        """
        sizes: dict[str, int] = {}
        for word in text.split(","):
            match = re.fullmatch(r"(tp|pp|vpp|cp|ep|etp|dp)([1-9]\d*)", word.strip())
            if match is None:
                raise ValueError(
                    f"layout {text!r}: no word {word.strip()!r}; a layout is some of {WORDS}, with commas"
                )
            name, size = match[1], int(match[2])
            if name in sizes:
                raise ValueError(f"layout {text!r}: {name} is there twice")
            sizes[name] = size
        attention = sizes.get("tp", 1) * sizes.get("cp", 1)
        experts = sizes.get("etp", 1) * sizes.get("ep", 1)
        smallest = math.lcm(attention, experts) // attention
        if sizes.get("dp", smallest) % smallest:
            raise ValueError(
                f"layout {text!r}: etp x ep = {experts} does not divide tp x cp x dp = "
                f"{attention * sizes['dp']}; dp must be a multiple of {smallest}"
            )
        if sizes.get("vpp", 1) > 1 and sizes.get("pp", 1) == 1:
            raise ValueError(f"layout {text!r}: virtual stages need a pipeline, pp2 or more")
        defaults = dict.fromkeys(("tp", "pp", "vpp", "cp", "ep", "etp"), 1) | {"dp": smallest}
        return cls(text, **(defaults | sizes))

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def flags(self) -> list[str]:
        """The flags of this layout, without Megatron's defaults."""
        sizes = {
            "--tensor-model-parallel-size": self.tp,
            "--pipeline-model-parallel-size": self.pp,
            "--num-virtual-stages-per-pipeline-rank": self.vpp,
            "--context-parallel-size": self.cp,
            "--expert-model-parallel-size": self.ep,
        }
        flags = ["--trainer-ranks", str(self.world_size)]
        for flag, size in sizes.items():
            flags += [flag, str(size)] if size > 1 else []
        # Megatron's default would be tp
        flags += ["--expert-tensor-parallel-size", str(self.etp)] if self.tp > 1 or self.etp > 1 else []
        # it runs MoE with tensor parallelism only if the sequence is split as well
        return flags + (["--sequence-parallel"] if self.tp > 1 else [])
