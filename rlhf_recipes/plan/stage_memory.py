"""A stage's memory as a plan says it, and what is held beside its tensors."""

from dataclasses import dataclass

GIB, MIB = 2**30, 2**20

# What is there beside the tensors of a stage. Fitted to PPO of a 7B and a 14B in NF4 on an H200 (see README.md).
WORKSPACES = 2 * 32 * MIB  # cuBLAS's, of the forward's and the backward's thread. Before Hopper they take 8 MiB each.
CONTEXT = 0.73 * GIB  # CUDA's: kernels and their state, which no allocator counts
FRAGMENTS = 0.27  # of all but the weights: what torch's allocator holds and nothing uses (22 % and 32 % were measured)
CPU_FRAGMENTS = 0.15


def gib(mib: float) -> str:
    """MiB as text, in GiB."""
    return f"{mib / 1024:.1f}" if mib >= 1024 else f"{mib / 1024:.2f}"


@dataclass(frozen=True)
class StagePlan:
    """A stage's memory in MiB: `parts` at their largest, and `phases`, each the sum of what is there at one time."""

    parts: dict[str, float]
    phases: dict[str, float]

    @property
    def peak_mib(self) -> float:
        """What torch.cuda.max_memory_allocated will say, or what a process on the CPU takes above its start."""
        return max(self.phases.values())

    @property
    def needed_mib(self) -> float:
        """The peak with what is held beside the tensors."""
        return self.peak_mib + self.parts["fragments"] + self.parts["context"]


def held_beside(peak: float, weights: float, on_gpu: bool) -> dict[str, float]:
    """Bytes that are held beside the tensors of a peak. Weights stay where they are and leave no fragments."""
    share, context = (FRAGMENTS, CONTEXT) if on_gpu else (CPU_FRAGMENTS, 0)
    return {"fragments": share * (peak - weights), "context": context}
